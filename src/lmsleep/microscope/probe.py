"""A linear probe: after which pass can the intermediate quantity of a task be read off the hidden states?"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lmsleep.microscope.seen import Row
from lmsleep.microscope.trace import watch
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.tasks import TASKS, Task

RIDGE = 1e-3  # of the mean square of a standardised feature, which is 1


def ridge(x: Tensor, targets: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Fit a linear classifier in closed form: ridge regression onto one-hot targets.

    Args:
        x: features `[n, d]`; they are standardised.
        targets: `[n, J]` int64: J questions about each row, each with classes `0 ... classes - 1`.
        classes: their number.

    Returns:
        A function from features `[m, d]` to the likeliest classes `[m, J]`.
    """
    # A feature that never changes would be divided by zero; 1e-12 makes it zero.
    centre, spread = x.mean(0), x.std(0).clamp(min=1e-12)

    def features(x: Tensor) -> Tensor:
        # The column of ones is the intercept.
        return torch.nn.functional.pad((x - centre) / spread, (0, 1), value=1.0)

    # One regression for all J questions: their one-hot targets stand side by side.
    A, Y = features(x), torch.nn.functional.one_hot(targets, classes).to(x.dtype)
    penalty = RIDGE * len(x) * torch.eye(A.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(A.T @ A + penalty, A.T @ Y.flatten(1))
    return lambda x: (features(x) @ weights).unflatten(1, (-1, classes)).argmax(-1)


def probed(task: Task) -> Callable[[Tensor], Tensor]:
    """Return the `intermediate` of a task: see `Depo.intermediate`.

    Raises:
        ValueError: for a task that has none.
    """
    intermediate: Callable[[Tensor], Tensor] | None = getattr(task, "intermediate", None)
    if intermediate is None:
        names = ", ".join(name for name, kind in TASKS.items() if hasattr(kind, "intermediate"))
        raise ValueError(
            f"task={type(task).__name__} offers no intermediate quantity to a probe; these do: {names}"
        )
    return intermediate


def probe_rows(
    model: Backbone, task: Task, sleep: SleepConfig, fit: Iterable[Tensor], test: Tensor
) -> Iterator[Row]:
    """Probe `h` after every pass over every window, fitted on contexts `fit`, scored on `test` `[B, T]`.

    One probe for all places of a window. `steps` is how far the intermediate quantity is from what a token
    says itself; pass 0 probes the embeddings, and so says what the token alone gives away; `constant` is
    the accuracy of always naming the class that was most frequent in fitting.

    Raises:
        ValueError: for a task without an intermediate quantity.
    """
    intermediate = probed(task)
    seen = [_seen(model, intermediate, sleep, tokens) for tokens in fit]
    for number, (h_test, y_test) in enumerate(_seen(model, intermediate, sleep, test)):
        if not len(y_test):
            continue
        # Windows hold other facts at other places, so each has probes of its own.
        y = torch.cat([batch[number][1] for batch in seen])
        classes, constant = int(max(y.max(), y_test.max())) + 1, y.mode(dim=0).values
        for n, x_test in enumerate(h_test):
            found = ridge(torch.cat([batch[number][0][n] for batch in seen]), y, classes)(x_test)
            for j in range(y.shape[1]):
                yield {
                    "window": number,
                    "pass": n,
                    "steps": j,
                    "accuracy": float((found[:, j] == y_test[:, j]).double().mean()),
                    "constant": float((constant[j] == y_test[:, j]).double().mean()),
                    "targets": len(y_test),
                }


def _seen(
    model: Backbone, intermediate: Callable[[Tensor], Tensor], sleep: SleepConfig, tokens: Tensor
) -> list[tuple[list[Tensor], Tensor]]:
    """Return per window the features `[n, d]` after passes 0, 1, ..., and what they should tell, `[n, J]`."""
    # Tasks compute on the CPU, in numpy or in plain loops.
    targets, seen = intermediate(tokens.cpu()).to(tokens.device), []
    for window in watch(model, tokens, sleep):
        y, targets = targets.tensor_split([window.tokens.shape[1]], dim=1)
        # -1 stands for a quantity that does not exist, such as a node beyond the edges that were read.
        asked = (y >= 0).all(-1)
        with torch.no_grad():
            h = [model.embed(window.tokens)]
            for each in window.passes:
                assert each.h is not None, "only a sleep in passes is probed"
                h.append(each.h)
        seen.append(([x[asked].double() for x in h], y[asked]))
    return seen
