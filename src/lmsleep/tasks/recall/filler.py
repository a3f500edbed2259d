"""Sentences of plain English that tell nothing of anybody."""

from random import Random


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


SUBJECTS = _phrases(
    """the weather | the river | the old bridge | the market | the road to the coast | the library |
    the train | the garden | the harbor | the museum | the school | the evening paper | the bakery |
    the path through the woods | the concert | the small theater | the station | the wind | the rain |
    the village square | the winter | the newspaper | the radio | the last bus | the lake | the meeting |
    the soup | the exhibition | the summer festival | the north wing"""
)
VERBS = _phrases(
    """was quiet | seemed longer than usual | had changed very little | was busy | was closed for repairs |
    looked different | had been crowded | was a little late | felt colder | was full of visitors | went
    on as planned | was mentioned twice | had a long history | was hard to find | pleased everyone | was
    not what people expected | could be heard from far away | was talked about for weeks"""
)
TIMES = _phrases(
    """that morning | in the afternoon | after the storm | for most of the week | before dinner | during the
    holidays | on the way home | until late at night | in early spring | on the first day | by the end
    of the month | as usual | for a while | in those years | once more | at noon"""
)
REMARKS = _phrases(
    """Nobody could say why. | It did not matter much. | There was nothing to be done about it. | Most people
    agreed. | The rest is easily told. | It was better that way. | Someone laughed in the next room. |
    Then it was time to go. | No one had noticed before. | That was all anyone remembered."""
)
REMARK = 0.2  # share of remarks


def filler(random: Random, number: int) -> list[str]:
    """Draw a number of sentences."""
    return [_sentence(random) for _ in range(number)]


def _sentence(random: Random) -> str:
    if random.random() < REMARK:
        return random.choice(REMARKS)
    subject, verb, time = (random.choice(part) for part in (SUBJECTS, VERBS, TIMES))
    sentence = f"{subject} {verb} {time}." if random.random() < 0.5 else f"{time}, {subject} {verb}."
    return sentence[0].upper() + sentence[1:]
