"""The parts of the day on a GPU, in the order of their value."""

from benchmarks.gpu.part import Part

WHOLE = 720  # seconds; the last part takes what the others leave
HERE = "benchmarks.gpu"
PARTS = (
    Part("floors", "What the machine can do", 15, f"{HERE}.speed:limits"),
    Part("kernels", "Kernels in the passes, against float64", 130, f"{HERE}.passes:kernels"),
    Part("tests", "Tests that need CUDA", 90, f"{HERE}.cuda_tests:cuda_tests"),
    Part("automaton", "A step of Rule 110 at the paper's size", 60, f"{HERE}.speed:automaton"),
    Part("depo", "A step of Depo at the paper's size", 70, f"{HERE}.speed:depo"),
    Part("window", "Windows and passes, 1.4 billion parameters", 100, f"{HERE}.speed:windows"),
    Part("decoding", "A session beside generate", 45, f"{HERE}.speed:decoding"),
    Part("sleeping", "The pause of a sleep", 30, f"{HERE}.speed:sleeping"),
    Part("joined", "One process under torchrun", 30, f"{HERE}.speed:joined"),
    Part("recurrence", "The recurrence by itself", 50, f"{HERE}.speed:recurrence"),
    Part("figure-2a", "Figure 2a at the paper's size", 100, f"{HERE}.updates:updates"),
)
