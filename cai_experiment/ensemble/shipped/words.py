"""The words of the experts' world. Its illnesses and medicines are invented: nothing here is about real ones."""

from __future__ import annotations

NAMES = (
    "Mira", "Ben", "Ada", "Tom", "Lena", "Otto", "Ruth", "Paul", "Ines", "Karl", "Nora", "Hugo",
    "Vera", "Emil", "Rosa", "Theo", "Clara", "Felix", "Greta", "Ivan", "Judith", "Leo", "Marta", "Nils",
    "Olga", "Peter", "Sonja", "Viktor", "Wilma", "Anton",
)  # fmt: skip
# (verb of the third person, its plain form, what can be done so)
HABITS = (
    ("keeps", "keep", ("hens", "goats", "bees", "sheep", "ducks", "rabbits")),
    ("sells", "sell", ("bread", "soap", "cloth", "lamps", "baskets", "cheese")),
    ("plays", "play", ("the flute", "the drum", "the violin", "the harp", "the horn", "the fiddle")),
    ("grows", "grow", ("beans", "roses", "plums", "onions", "melons", "herbs")),
    ("paints", "paint", ("boats", "walls", "birds", "faces", "hills", "clouds")),
)
PLACES = ("the mill", "the quarry", "the harbour", "the forge", "the dairy", "the school", "the mine", "the inn")
COUNTED = (
    "pears", "loaves", "coins", "books", "candles", "eggs", "shells", "tiles", "ropes", "cups", "nails", "buttons",
)  # fmt: skip
ILLNESSES = (
    "marrow fever", "glass cough", "tide ache", "lantern rash", "quarry lung", "willow cramp", "ember throat",
    "hollow sleep", "copper chill", "moth palsy", "river gout", "salt blindness", "thorn fever", "ash colic",
    "velvet pox", "winter drowse",
)  # fmt: skip
MEDICINES = (
    "tolvane", "brenil", "osperin", "caldux", "mirafen", "juvolin", "petrasol", "nexamide", "dorvic", "hyperal",
    "lumetin", "zantor", "quilane", "fesorin", "abrocil", "wendol",
)  # fmt: skip
DOSES = (4, 7, 2, 9, 6, 3, 8, 5, 7, 2, 6, 4, 9, 3, 8, 5)  # mg for each kg of weight, of the medicine in that place
# how each of these can be, and what can be so: a sign of an illness is a pair
MANNERS = ("dry", "stiff", "cold", "swollen", "sore", "numb", "pale", "itchy")
PARTS = ("throat", "neck", "hands", "knees", "back", "eyelids")
