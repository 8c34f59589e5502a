"""Classes of receptacles and objects: their rooms, the possible places of an object, and its affordances.

Class names and affordances are ALFWorld's. The places of objects follow common sense. The frequency of receptacles
follows the 120 official floor plans. The tables are texts with one class per line, and are parsed at import.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

ROOM_KINDS = ("kitchen", "livingroom", "bedroom", "bathroom")

OPENABLE = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})

TREATMENTS: Mapping[str, tuple[str, str]] = {
    "pick_clean_then_place_in_recep": ("clean", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("heat", "Microwave"),
    "pick_cool_then_place_in_recep": ("cool", "Fridge"),
}
"""Task type -> (treatment of the target, receptacle class that gives it)."""


@dataclass(frozen=True)
class RoomKind:
    """One kind of room.

    Attributes:
        first_floor: number of the first floor plan. As in ALFRED, the numbers of two kinds differ by 100 or more.
        receptacles: minimum and maximum number of receptacles of a room of official size.
        things: minimum and maximum number of movable objects of a room of official size.
        task_types: task types that are possible in this kind of room.
        required: receptacle classes that every such room has. It has one of the alternatives `A|B`.
        frequency: receptacle class -> (mean count, maximum count) in an official room.
    """

    first_floor: int
    receptacles: tuple[int, int]
    things: tuple[int, int]
    task_types: tuple[str, ...]
    required: tuple[tuple[str, ...], ...]
    frequency: Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class Thing:
    """One class of object.

    Attributes:
        rooms: room kind -> probability that a floor plan of that kind has this class.
        affordances: some of clean, heat, cool, slice (treatments), light (a lamp), hollow (can contain objects).
        places: receptacle classes that can contain it.
    """

    rooms: Mapping[str, float]
    affordances: frozenset[str]
    places: frozenset[str]

    @property
    def movable(self) -> bool:
        """Whether an agent can pick it up. Lamps are fixed."""
        return "light" not in self.affordances


def _room(
    first_floor: int, receptacles: tuple[int, int], things: tuple[int, int], tasks: str, required: str, frequency: str
) -> RoomKind:
    counts = {}
    for entry in frequency.split():
        name, mean, most = entry.split(":")
        counts[name] = (float(mean), int(most))
    short: dict[str, str] = dict(zip(("place", "light", "clean", "heat", "cool", "two"), TASK_TYPES, strict=True))
    task_types = tuple(short[word] for word in tasks.split())
    alternatives = tuple(tuple(group.split("|")) for group in required.split())
    return RoomKind(first_floor, receptacles, things, task_types, alternatives, counts)


ROOMS: Mapping[str, RoomKind] = {
    "kitchen": _room(
        1, (16, 30), (25, 45), "place clean heat cool two", "Fridge Microwave SinkBasin",
        "Cabinet:9:14 Drawer:5:9 StoveBurner:4:4 CounterTop:2.3:3 Fridge:1:1 Microwave:1:1 SinkBasin:1:1 Toaster:1:1 "
        "CoffeeMachine:1:1 GarbageCan:1:1 DiningTable:.7:2 Shelf:.5:3 SideTable:.1:1 Safe:.05:1",
    ),
    "livingroom": _room(
        201, (8, 20), (12, 26), "place light two", "SideTable|CoffeeTable|DiningTable|Dresser|Desk",
        "Drawer:3.8:8 Shelf:2.7:8 SideTable:1.5:4 Sofa:1.2:2 ArmChair:1.2:3 CoffeeTable:1:2 GarbageCan:1:1 "
        "DiningTable:.6:2 Cabinet:.6:4 TVStand:.5:1 Dresser:.4:2 Ottoman:.15:1 Safe:.1:1 Desk:.1:1",
    ),
    "bedroom": _room(
        301, (9, 22), (12, 26), "place light two", "Desk|SideTable|Dresser",
        "Drawer:5.3:10 Shelf:2.7:8 Bed:1.1:2 GarbageCan:1:1 SideTable:.9:2 Desk:.8:2 Dresser:.6:2 Cabinet:.5:4 "
        "ArmChair:.3:2 LaundryHamper:.3:1 Safe:.2:1 DiningTable:.2:1 CounterTop:.05:1",
    ),
    "bathroom": _room(
        401, (8, 16), (12, 24), "place clean two", "SinkBasin",
        "Cabinet:2.1:6 Drawer:1.9:6 SinkBasin:1.4:2 HandTowelHolder:1.2:2 TowelHolder:1.2:2 CounterTop:1:2 Toilet:1:1 "
        "ToiletPaperHanger:1:1 GarbageCan:1:1 BathtubBasin:.7:1 Shelf:.5:3 SideTable:.1:1 Dresser:.1:1 Cart:.1:1",
    ),
}  # fmt: skip

_GROUPS = {
    "@top": "CounterTop DiningTable SideTable CoffeeTable Desk Dresser TVStand Shelf Cart",
    "@table": "CounterTop DiningTable SideTable CoffeeTable Desk Dresser",
    "@seat": "Sofa ArmChair Ottoman Bed",
    "@inside": "Drawer Cabinet",
    "@worktop": "CounterTop DiningTable SideTable",
    "@bath": "CounterTop Drawer Cabinet Shelf Cart SinkBasin BathtubBasin Toilet",
}

# class | rooms (K, L, B, T = kitchen, living room, bedroom, bathroom: nearly always; lower case: sometimes)
#       | affordances | places
_THINGS = """
AlarmClock     | B   |                        | @top
Apple          | K   | clean heat cool slice  | @worktop Fridge Microwave SinkBasin GarbageCan
BaseballBat    | b   |                        | Bed Desk DiningTable CoffeeTable SideTable
BasketBall     | b   |                        | @seat Desk DiningTable CoffeeTable Dresser
Book           | lB  |                        | @top @seat Drawer Cabinet
Boots          | lb  |                        | Bed ArmChair Ottoman SideTable
Bowl           | Klb | clean heat cool hollow | @top Fridge Microwave SinkBasin Cabinet
Box            | Lb  |                        | @table @seat TVStand
Bread          | K   | heat cool slice        | @worktop Fridge Microwave GarbageCan
ButterKnife    | K   | clean                  | @worktop Drawer SinkBasin
CD             | B   |                        | @top Drawer Safe GarbageCan
Candle         | lT  |                        | @top Drawer Cabinet BathtubBasin Toilet
CellPhone      | klB |                        | @top @seat Drawer Safe
Cloth          | bT  | clean                  | @bath SideTable Dresser LaundryHamper
CreditCard     | kLB |                        | @top @seat Drawer
Cup            | K   | clean heat cool hollow | @worktop Cabinet Shelf Fridge Microwave SinkBasin
DeskLamp       | lB  | light                  | Desk SideTable Dresser CoffeeTable DiningTable Shelf
DishSponge     | Kt  | clean                  | @bath SideTable GarbageCan
Egg            | K   | clean heat cool slice  | @worktop Fridge Microwave SinkBasin GarbageCan
FloorLamp      | Lb  | light                  | Desk SideTable Dresser CoffeeTable DiningTable Shelf
Fork           | K   | clean                  | @worktop Drawer SinkBasin
Glassbottle    | k   | cool                   | @worktop Cabinet Shelf Fridge GarbageCan
HandTowel      | T   |                        | HandTowelHolder CounterTop Cabinet Drawer SinkBasin GarbageCan
Kettle         | k   | clean                  | @worktop Cabinet StoveBurner SinkBasin Shelf
KeyChain       | LB  |                        | @top @seat Drawer Safe
Knife          | K   | clean                  | @worktop Drawer SinkBasin
Ladle          | k   | clean                  | @worktop Drawer Cabinet SinkBasin
Laptop         | LB  |                        | @table @seat TVStand
Lettuce        | K   | clean cool slice       | @worktop Fridge SinkBasin GarbageCan
Mug            | Kb  | clean heat cool hollow | @worktop Desk Shelf Cabinet CoffeeMachine Fridge Microwave SinkBasin
Newspaper      | l   |                        | @table @seat TVStand Drawer GarbageCan
Pan            | K   | clean cool hollow      | @worktop Cabinet StoveBurner Fridge SinkBasin
PaperTowelRoll | kt  |                        | @worktop @inside Shelf GarbageCan Toilet
Pen            | klB |                        | @top Drawer GarbageCan
Pencil         | klB |                        | @top Drawer GarbageCan
PepperShaker   | K   |                        | @worktop @inside Shelf
Pillow         | LB  |                        | @seat
Plate          | Kl  | clean heat cool hollow | @worktop CoffeeTable Cabinet Shelf Fridge Microwave SinkBasin
Plunger        | T   |                        | Cabinet Cart
Pot            | K   | clean cool hollow      | @worktop Cabinet StoveBurner Fridge SinkBasin
Potato         | K   | clean heat cool slice  | @worktop Fridge Microwave SinkBasin GarbageCan
RemoteControl  | Lb  |                        | @top @seat Drawer
SaltShaker     | K   |                        | @worktop @inside Shelf
ScrubBrush     | T   |                        | CounterTop Cabinet Shelf Toilet BathtubBasin
SoapBar        | T   | clean                  | @bath GarbageCan
SoapBottle     | KT  |                        | @worktop @inside Shelf Cart Toilet GarbageCan
Spatula        | K   | clean                  | @worktop Drawer SinkBasin
Spoon          | K   | clean                  | @worktop Drawer SinkBasin
SprayBottle    | kT  |                        | @worktop @inside Shelf Cart Dresser Toilet GarbageCan
Statue         | kLb |                        | @top Safe
TeddyBear      | b   |                        | @seat Desk Dresser
TennisRacket   | b   |                        | Bed Desk DiningTable SideTable Dresser
TissueBox      | lbt |                        | @top @inside Toilet GarbageCan
ToiletPaper    | T   |                        | CounterTop @inside Shelf Cart Toilet ToiletPaperHanger GarbageCan
Tomato         | K   | clean heat cool slice  | @worktop Fridge Microwave SinkBasin GarbageCan
Towel          | T   |                        | TowelHolder CounterTop Cabinet BathtubBasin
Vase           | kl  |                        | @top Cabinet Safe
Watch          | Lb  |                        | @top Drawer Safe
WateringCan    | l   |                        | @table Drawer TVStand
WineBottle     | k   | cool                   | @worktop Cabinet Shelf Fridge GarbageCan
"""

_ALWAYS, _SOMETIMES = 0.95, 0.35


def _things(table: str) -> dict[str, Thing]:
    letters = dict(zip("KLBT", ROOM_KINDS, strict=True))
    things = {}
    for line in table.strip().splitlines():
        name, rooms, affordances, places = (cell.strip() for cell in line.split("|"))
        probability = {letters[r.upper()]: _ALWAYS if r.isupper() else _SOMETIMES for r in rooms}
        holders = " ".join(_GROUPS.get(place, place) for place in places.split())
        things[name] = Thing(probability, frozenset(affordances.split()), frozenset(holders.split()))
    return things


THINGS: Mapping[str, Thing] = _things(_THINGS)
"""Object class -> its properties."""
