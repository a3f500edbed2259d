"""Three worlds to tell a problem in: harbours with boats, libraries with books, orchards with trees.

Names of the core and of the noise are disjoint. Noise names are a first and a second word each, in groups
that share the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from random import Random

from lmsleep.tasks.gsm_infinite.structure import Parameter, Structure

Thing = tuple[str, str]  # singular, plural

INSTRUCTION = (
    "A total covers every kind that is mentioned for its place, and no other kind. "
    "The total number of {attribute} in a place adds up, over these kinds, the number of {category} "
    "times their average number of {attribute}. Averages differ from place to place. "
    "A difference is the first number less the second."
)


@dataclass(frozen=True)
class Template:
    """Names and turns of phrase.

    Attributes:
        category: what the things are, in the plural.
        attribute: what each of them has some of, in the plural.
        places, things: groups of names; a problem takes its places from one group and its things from one.
        noise_places, noise_things: first words and second words of the names of noise.
        equals: verb between a parameter and its value.
        more, times: between a constant and what it is added to or multiplied with.
        difference: before the two numbers of a difference.
    """

    category: str
    attribute: str
    places: tuple[tuple[str, ...], ...]
    things: tuple[tuple[Thing, ...], ...]
    noise_places: tuple[str, str]
    noise_things: tuple[str, str]
    equals: str
    more: str
    times: str
    difference: str

    @cached_property
    def all_noise_places(self) -> list[str]:
        """The 640 names of places."""
        return [" ".join(words) for words in product(*(part.split() for part in self.noise_places))]

    @cached_property
    def all_noise_things(self) -> list[tuple[Thing, ...]]:
        """The names of things, in 32 groups of 20."""
        first, second = (part.split() for part in self.noise_things)
        return [tuple((f"{word} {noun}", f"{word} {plural(noun)}") for noun in second) for word in first]

    @property
    def instruction(self) -> str:
        """The sentences that say what totals and differences mean."""
        return INSTRUCTION.format(attribute=self.attribute, category=self.category)


def plural(noun: str) -> str:
    """Return the English plural of a regular noun (or of one in -is)."""
    if noun.endswith("is"):
        return noun[:-2] + "es"
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _things(*groups: str) -> tuple[tuple[Thing, ...], ...]:
    return tuple(
        tuple((noun, plural(noun)) for noun in (word.replace("_", " ") for word in group.split()))
        for group in groups
    )


HARBOUR = Template(
    category="boats",
    attribute="sailors",
    places=(
        ("Gull Point", "Cormorant Bay", "Heron Quay", "Tern Spit", "Pelican Cove"),
        ("Salt Haven", "Amber Wharf", "Copper Dock", "Slate Landing", "Ivory Pier"),
    ),
    things=_things("trawler ferry tugboat barge freighter", "sloop ketch schooner cutter dinghy"),
    noise_places=(
        "North South East West Upper Lower Old New Outer Inner Far Near Great Little Broad Narrow "
        "Long Short High Low Deep Shallow Grey Black White Green Misty Windy Sunny Stormy Quiet "
        "Rocky",
        "Harbour Lagoon Strait Sound Inlet Estuary Channel Basin Anchorage Marina Reef Shoal "
        "Beach Jetty Breakwater Lighthouse Sandbank Fjord Delta Cape",
    ),
    noise_things=(
        "red blue green yellow orange purple brown black white grey wooden steel iron plastic "
        "rubber canvas old new tiny huge fast slow quiet noisy heavy light painted rusty patched "
        "borrowed rented striped",
        "canoe raft kayak punt skiff yacht brig clipper galley gondola launch junk catamaran "
        "hydrofoil steamer tanker icebreaker dredger whaler corvette",
    ),
    equals="is",
    more="more than",
    times="times",
    difference="the difference between",
)

LIBRARY = Template(
    category="books",
    attribute="pictures",
    places=(
        ("Ashgrove Library", "Birchwood Library", "Cedarfield Library", "Oakham Library", "Willowby Library"),
        ("Canal Reading Room", "Castle Reading Room", "Market Reading Room", "Mill Reading Room",
         "Station Reading Room"),
    ),
    things=_things(
        "atlas dictionary encyclopedia almanac textbook", "novel comic biography cookbook songbook"
    ),
    noise_places=(
        "Abbey Acorn Beacon Bishop Bridge Chapel Cherry Clock Cobble Corner Crescent Crown "
        "Dovecote Fountain Garden Granary Guild Hill Island Lantern Meadow Museum Orchid Palace "
        "Park Prince Quarry Queen River Rose Temple Valley",
        "Archive Study Bookshop Gallery College School Academy Hall House Annex Lodge Institute "
        "Kiosk Cloister Pavilion Tower Depot Cabinet Stall Salon",
    ),
    noise_things=(
        "ancient modern printed handwritten bound torn dusty rare popular famous forgotten "
        "illustrated translated foreign local royal secret sacred comical serious thick thin "
        "leather paper gilded faded signed censored donated stolen precious cheap",
        "manuscript pamphlet journal magazine newspaper scrapbook hymnal ledger catalogue manual "
        "guidebook anthology memoir thesis chronicle fable romance thriller tragedy workbook",
    ),
    equals="equals",
    more="plus",
    times="multiplied by",
    difference="the difference of",
)  # fmt: skip

ORCHARD = Template(
    category="trees",
    attribute="nests",
    places=(
        ("Sunrise Orchard", "Sunset Orchard", "Hilltop Orchard", "Riverside Orchard", "Stonewall Orchard"),
        ("Abbot Farm", "Miller Farm", "Shepherd Farm", "Weaver Farm", "Potter Farm"),
    ),
    things=_things(
        "pear_tree plum_tree cherry_tree apple_tree quince_tree",
        "oak_tree beech_tree maple_tree birch_tree willow_tree",
    ),
    noise_places=(
        "Badger Fox Hare Otter Stag Boar Mole Lynx Wolf Bear Raven Owl Robin Finch Swallow Magpie "
        "Crane Falcon Sparrow Thrush Clover Thistle Nettle Bramble Heather Fern Moss Poppy Daisy "
        "Violet Barley Rye",
        "Field Grove Glade Copse Thicket Paddock Pasture Heath Moor Dell Glen Ridge Slope Terrace "
        "Plantation Nursery Estate Ranch Homestead Vineyard",
    ),
    noise_things=(
        "tall short young mature gnarled crooked slender leafy bare flowering grafted pruned wild "
        "dwarf giant weeping evergreen hardy thorny mossy hollow twisted shady scented golden "
        "silver crimson copper pale dark spotted smooth",
        "cedar spruce larch pine fir yew cypress juniper hazel walnut chestnut almond olive fig "
        "lemon palm elm poplar alder rowan",
    ),
    equals="amounts to",
    more="on top of",
    times="times",
    difference="the difference of",
)

TEMPLATES = {"harbour": HARBOUR, "library": LIBRARY, "orchard": ORCHARD}


@dataclass(frozen=True)
class Names:
    """The names of the places and things of a problem, in one of the templates."""

    template: str
    places: Sequence[str]
    things: Sequence[Thing]

    def __call__(self, p: Parameter) -> tuple[str, str, str]:
        """Return kind, place and thing (empty for totals) of a parameter."""
        return p.kind, self.places[p.place], self.things[p.thing][1] if p.thing >= 0 else ""


def draw_names(random: Random, structure: Structure, templates: Sequence[str]) -> Names:
    """Draw names out of one group each of places and things of one of the templates."""
    name = random.choice(templates)
    template, kinds = TEMPLATES[name], len({thing for there in structure.things for thing in there})
    places = random.sample(random.choice(template.places), len(structure.things))
    return Names(name, places, random.sample(random.choice(template.things), kinds))
