"""Words that facts are made of: names of people, things, colors, cities, jobs; mostly one token each."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Adam Alan Albert Alex Alice Amy Andrew Ann Anna Anne Anthony Arthur Barbara Ben Benjamin Betty Bill
    Bob Brian Carl Carlos Carol Charles Charlotte Chen Chris Christopher Claire Clara Daniel David Deborah
    Diana Donald Dorothy Edward Edwin Eleanor Elizabeth Ella Ellen Emily Emma Eric Ethan Eva Felix Frances
    Frank Fred Gabriel Gary George Greg Hannah Harry Helen Henry Howard Hugh Ian Iris Isaac Ivan Jack
    Jacob Jane Jason Jean Jennifer Jeremy Jessica Jim Joan Joel John Jonathan Joseph Juan Judith Julia
    Justin Karen Karl Kate Katherine Keith Kelly Kenneth Kevin Kim Larry Laura Lauren Leo Lewis Lily Linda
    Lisa Logan Louise Lucas Lucy Luke Marcus Margaret Maria Marie Mark Martha Martin Mary Mason Matthew
    Max Maya Melissa Mia Michael Michelle Monica Nancy Nathan Neil Nick Nicole Nina Noah Oliver Olivia
    Omar Oscar Owen Patricia Patrick Paul Pedro Peter Philip Rachel Ralph Ray Rebecca Richard Robert Roger
    Ronald Rosa Russell Ruth Ryan Sam Samuel Sandra Sarah Scott Sharon Simon Sophia Sophie Stanley
    Stephanie Stephen Steve Susan Teresa Terry Theodore Tim Timothy Tom Tony Tyler Victor Victoria Vincent
    Walter Wayne Wendy William
""")
THINGS = _words("""
    bag ball bed bicycle bike bird boat book bowl box car carpet cat chair clock coat cup desk dog door
    dress drum flag guitar hat horse house jacket kite knife lamp mirror pen phone piano ring shirt table
    tent truck umbrella vase watch
""")
COLORS = _words("""
    black blue bronze brown copper golden gray green orange pink purple red silver violet white yellow
""")
CITIES = _words("""
    Amsterdam Athens Atlanta Baghdad Barcelona Beijing Berlin Boston Brussels Budapest Cairo Cambridge
    Chicago Copenhagen Dallas Delhi Denver Detroit Dublin Edinburgh Geneva Glasgow Hamburg Havana Houston
    Istanbul Jerusalem Kyoto Lima Lisbon Liverpool London Madrid Manchester Melbourne Miami Milan Montreal
    Moscow Mumbai Munich Nairobi Naples Oslo Oxford Paris Prague Rome Seattle Seoul Shanghai Singapore
    Stockholm Sydney Tokyo Toronto Vancouver Venice Vienna Warsaw
""")
JOBS = _words("""
    baker butcher carpenter chef cook dentist doctor driver farmer gardener hunter judge lawyer miner
    nurse painter pilot poet sailor singer tailor teacher writer
""")
