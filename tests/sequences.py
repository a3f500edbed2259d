# What holds for every way of remembering: rows do not meet, texts come in any pieces, files go on.
import torch
from conftest import close, random_tokens, same_memory

from lmsleep import Session, SessionBatch, sleep_forward
from lmsleep.session.stream import next_logits

TOKENS, LENGTHS = random_tokens(3, 14), torch.tensor([14, 9, 4])


def heard(session):
    return next_logits(session.model, session.sleep_config, [session.stream])[0]


def rows_do_not_meet(model, sleep, near=1e-12):
    for last in (False, True):
        together = sleep_forward(model, TOKENS, None, sleep, lengths=LENGTHS, evict_last=last)
        for row, n in enumerate(LENGTHS.tolist()):
            alone = sleep_forward(model, TOKENS[row : row + 1, :n], None, sleep, evict_last=last)
            assert close(together.logits[row, :n], alone.logits[0], near)
            assert same_memory(together.memory[[row]], alone.memory, near)
            assert together.sleeps[row] == alone.sleeps[0] == (n - 1) // sleep.window + last


def goes_on(model, sleep, path, near=1e-12):
    tokens = TOKENS[0]
    whole = sleep_forward(model, tokens[None], None, sleep)
    for pieces in ([1] * 14, [3, 1, 6, 4], [14]):
        session = Session(model, sleep)
        for piece in tokens.split(pieces):
            session.read(piece)
        assert same_memory(session.memory, whole.memory, near)
        assert not any(t.requires_grad for t in session.memory.tensors())
    first = Session(model, sleep)
    first.read(tokens[:10])
    first.save(path)
    again, fork = Session.load(path, model), first.fork()
    assert again.sleep_config == sleep
    for session in (first, again, fork):
        session.read(tokens[10:])
        assert same_memory(session.memory, whole.memory, near)
        assert close(heard(session), whole.logits[0, -1], near)


def reads_together(model, sleep, near=1e-12):
    alone = [Session(model, sleep) for _ in range(4)]
    batch = SessionBatch([Session(model, sleep) for _ in range(4)])
    for cuts in ([2, 4, 0, 1], [3, 1, 5, 0], [1, 1, 1, 1], [4, 7, 2, 6]):
        texts = [random_tokens(n, seed=n) for n in cuts]
        for session, text in zip(alone, texts, strict=True):
            session.read(text)
        batch.read(texts)
    for mine, other in zip(batch.sessions, alone, strict=True):
        assert same_memory(mine.memory, other.memory, near)
        assert close(heard(mine), heard(other), 10 * near)
