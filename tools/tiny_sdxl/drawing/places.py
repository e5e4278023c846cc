"""Every place: its words, its drawing, its light."""

from __future__ import annotations

from . import indoors, outdoors, sights
from .mood import Light, Place
from .palette import INDIGO, hexa

PLACES: dict[str, Place] = {
    "beach": Place(
        ("on a sandy beach at sunset", "on the beach during sunset"),
        outdoors.beach,
        Light(hexa("ffd08a"), 0.3, hexa("5a2a66"), 0.2, shadow=hexa("6b3450"), shadow_strength=0.5),
        aside=0.03,
    ),
    "snow": Place(
        ("in the snow under warm sunlight", "in the snow"),
        outdoors.snow,
        Light(hexa("fff1cf"), 0.2, hexa("4a6aa8"), 0.16, shadow=hexa("5f7fb5")),
        outdoors.snowdrift,
        ground=0.91,
    ),
    "jungle": Place(
        ("in the jungle",),
        outdoors.jungle,
        Light(
            hexa("e9ffc0"), 0.18, hexa("0d3a30"), 0.2, shadow=hexa("07251c"), shadow_strength=0.5
        ),
        outdoors.jungle_leaves,
        most=0.7,
    ),
    "space": Place(
        ("floating in outer space",),
        indoors.space,
        Light(hexa("fff3dc"), 0.16, hexa("140d38"), 0.26),
        ground=None,
        # Smaller, as what leans so far reaches further.
        most=0.69,
        lean=22,
        aside=0.03,
    ),
    "silk": Place(
        ("placed on pink silk fabric", "on pink silk fabric"),
        indoors.silk,
        Light(shade=hexa("8a2f5c"), shadow=hexa("7a2450"), shadow_strength=0.5),
        lean=9,
    ),
    "neon": Place(
        ("surrounded by neon lights",),
        indoors.neon,
        Light(
            hexa("ffd6f0"),
            0.1,
            hexa("160a3a"),
            0.18,
            edges=(hexa("ff4fa8"), hexa("35e6f2")),
            shadow=hexa("0a0522"),
            shadow_strength=0.6,
        ),
        most=0.7,
    ),
    "dark": Place(
        ("in the dark",),
        indoors.dark,
        Light(key_strength=0.0, shade_strength=0.0, shadow=hexa("000008"), shadow_strength=0.5),
        adjectives=("glowing",),
        halo=True,
    ),
    "city": Place(
        ("with a city skyline in the background",),
        sights.city,
        Light(hexa("fff4e0"), shadow=hexa("4c4a66")),
        most=0.7,
    ),
    "mountains": Place(
        ("with mountains and mist in the background", "with mountains in the background"),
        outdoors.mountains,
        Light(hexa("fff2e6"), shade=hexa("41588a"), shadow=hexa("34503c")),
        most=0.7,
    ),
    "couch": Place(
        ("sitting on a red couch indoors",),
        indoors.couch,
        Light(
            hexa("fff0cc"), 0.16, hexa("5a1220"), 0.16, shadow=hexa("4a0a18"), shadow_strength=0.55
        ),
        most=0.68,
    ),
    "books": Place(
        ("on a wooden shelf surrounded by books",),
        indoors.books,
        Light(
            hexa("ffe9c4"), 0.14, hexa("2f1810"), 0.18, shadow=hexa("2a1408"), shadow_strength=0.55
        ),
        ground=0.895,
        most=0.7,
    ),
    "water": Place(
        ("floating in crystal clear water",),
        sights.water,
        Light(shade=hexa("0f5f86"), shade_strength=0.12),
        sights.water_before,
        ground=None,
        lean=14,
        most=0.7,
    ),
    "gallery": Place(
        ("in a minimalist art gallery",),
        indoors.gallery,
        Light(shadow=hexa("5a5360"), shadow_strength=0.36),
        ground=0.85,
        most=0.66,
    ),
    "white": Place(
        ("on a white surface",),
        indoors.white,
        Light(shadow=hexa("5c5c78"), shadow_strength=0.42),
        adjectives=("", "modern minimalistic"),
    ),
    "park": Place(
        ("in a city park surrounded by flowers",),
        sights.park,
        Light(hexa("fffbe0"), 0.16, hexa("2f5a4a"), shadow=hexa("24502c")),
        sights.park_flowers,
        most=0.68,
    ),
    "eiffel": Place(
        ("with the Eiffel Tower in the background",),
        sights.eiffel,
        Light(hexa("fff0e0"), shade=INDIGO, shadow=hexa("3a5634")),
        most=0.62,
        aside=0.1,
    ),
}
