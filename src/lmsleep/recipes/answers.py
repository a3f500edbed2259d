"""What the shipped models answer about graphs that are drawn just now."""

from dataclasses import dataclass
from typing import Any

from lmsleep import shipped
from lmsleep.evaluation import Score, evaluate
from lmsleep.opening import open_model
from lmsleep.recipes.results import interval
from lmsleep.recipes.table import as_text
from lmsleep.session import Session
from lmsleep.tasks import batch_rng
from lmsleep.training import RunFolder

SHIPPED = ("depo-N1", "depo-N4")
BATCHES, SIZE, QUESTIONS = 8, 64, 8  # batches, graphs in each, questions about each
ABOUT = (
    "depo-N1 was trained with one pass a sleep, depo-N4 with four: the same model, for the same compute.\n"
    "Each reads a hidden cycle of 8 nodes as 8 shuffled edges, sleeps as it was trained to, and forgets the\n"
    "text; then it is asked where a node leads after k hops."
)


@dataclass(frozen=True)
class Answers:
    """What the shipped models answer about graphs drawn just now, none of which training ever drew.

    Attributes:
        seed: of the draw.
        graph: one of them, as it is read.
        asked: questions about it, the right answer, and that of each model.
        scores: over `BATCHES * SIZE` of them, by model.
    """

    seed: int
    graph: str
    asked: list[list[str]]
    scores: dict[str, Score]

    @classmethod
    def drawn(cls, seed: int) -> "Answers":
        """Draw graphs and ask."""
        task = RunFolder.open(shipped.find(SHIPPED[0])).config().task
        context = task.batch(batch_rng(seed, "test", 0), 1, "test").context
        assert context is not None
        graph = task.spell(context[0].tolist())
        words = graph.split()
        # Two words an edge, from and to; each node has one way out.
        edges = dict(zip(words[::2], words[1::2], strict=True))
        asked, scores = list[list[str]](), dict[str, Score]()
        # Questions of 1 ... 4 hops, all about one node: the answer of one is the start of the next hop.
        node = words[0]
        for k in range(1, 5):
            node = edges[node]
            asked.append([f"HOP_{k} {words[0]}", node])
        for name in SHIPPED:
            model, sleep, tokenizer = open_model(name, device="cpu")
            session = Session(model, sleep, tokenizer)
            session.read(graph)
            # The edges fill two windows; the second would sleep only when the next token comes.
            session.sleep()
            for line in asked:
                # A fork each, so that no question is part of what the next one is asked of.
                line.append(str(session.fork().generate(line[0], max_new_tokens=1)))
            scores[name] = evaluate(model, task, sleep, batches=BATCHES, batch_size=SIZE, seed=seed)
        return cls(seed, graph, asked, scores)

    def lines(self) -> list[list[str]]:
        """Return accuracy by hops, with its 95 % interval."""
        lines = [["k", *self.scores]]
        for k in next(iter(self.scores.values())).per_difficulty:
            cells = [
                # One "seed": the interval is that of the answers, for nothing was trained here.
                interval([{"seed": 0, "accuracy": score.per_difficulty[k], "answers": score.total[k]}])
                for score in self.scores.values()
            ]
            lines.append([str(k), *cells])
        return lines

    def text(self) -> str:
        """Return all of it for a terminal."""
        one = as_text([["question", "right", *self.scores], *self.asked])
        return f"""{ABOUT}

A cycle that neither was trained on (drawn with seed {self.seed}):
{self.graph}

{one}

Accuracy on {BATCHES * SIZE} such cycles, {QUESTIONS} questions each, by hops [95 % interval of the answers]:

{as_text(self.lines())}
"""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready figures."""
        return {"seed": self.seed, **{name: score.to_dict() for name, score in self.scores.items()}}
