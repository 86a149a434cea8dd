"""The vocabulary of the written world: topics with their nouns, actions and tips; adjectives, circumstances, faults.

Everything is in this project's own words. `UNSEEN_NOUNS` never stand in the training text.
"""

from __future__ import annotations

# fmt: off
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """One field of life: what people ask about (nouns), what they do with it (actions), what helps (tips)."""

    nouns: tuple[str, ...]
    actions: tuple[str, ...]
    tips: tuple[str, ...]


def _topic(nouns: str, actions: str, tips: str) -> Topic:
    split = lambda text: tuple(part.strip() for part in text.split("|"))  # noqa: E731
    return Topic(split(nouns), split(actions), split(tips))


TOPICS: dict[str, Topic] = {
    "kitchen": _topic("kettle|frying pan|oven|toaster|knife|fridge|cutting board|blender|sink|teapot|stove|whisk|colander|spice rack",
        "clean|descale|repair|store|polish", "Let everything cool down before you touch it|Warm water and a soft cloth do most of the work|Keep the handle dry"),
    "garden": _topic("rose bush|hedge|lawn|compost heap|greenhouse|wheelbarrow|pond|apple tree|flower bed|fence|rake|vegetable patch|hose|birdbath",
        "trim|water|move|protect|tidy up", "Work early in the day when the soil is still cool|Add a layer of mulch around the roots|Rinse the tools when you are done"),
    "bathroom": _topic("shower|bathtub|mirror|drain|tap|towel rack|tile wall|toilet seat|shower curtain|basin|bath mat|soap dish|wall cabinet|shower head",
        "unclog|scrub|replace|seal|descale", "Open a window so that the air stays dry|Put a towel under your knees|Let the cleaner rest for ten minutes"),
    "workshop": _topic("drill|hammer|saw|workbench|toolbox|clamp|chisel|ladder|vice|screwdriver|sander|tape measure|lathe|glue gun",
        "sharpen|adjust|test|oil|put away", "Measure twice before you cut|Wear gloves and safety glasses|Sweep the dust off the bench first"),
    "bicycle": _topic("bike chain|brake|saddle|front wheel|pedal|handlebar|bell|tyre|mudguard|bike lock|gear lever|pump|basket|bike light",
        "tighten|fix|grease|fit|check", "Turn the bike upside down on an old blanket|Use the smallest key that fits|Spin the wheel slowly and listen"),
    "car": _topic("engine|windscreen|car seat|battery|headlight|bumper|tank|wiper|gearbox|exhaust|boot lid|dashboard|radiator|car door",
        "inspect|wash|change|warm up|cover", "Park on level ground and pull the brake|Read the page on it in the manual|Note the date and the mileage"),
    "clothes": _topic("wool jumper|silk scarf|raincoat|pair of jeans|dress|shirt|winter coat|hat|glove|skirt|sock|tie|cardigan|belt",
        "wash|iron|mend|dye|fold", "Look at the label inside first|Turn it inside out|Dry it flat and away from the sun"),
    "shoes": _topic("boot|sandal|sneaker|slipper|heel|shoelace|insole|hiking shoe|leather shoe|rubber boot|dance shoe|clog|shoe box|sole",
        "waterproof|stretch|glue|brush|break in", "Stuff it with paper overnight|Use a thin coat of wax|Let it dry at room temperature"),
    "furniture": _topic("wardrobe|sofa|bookshelf|table|armchair|drawer|bed frame|stool|desk|cupboard|coffee table|bench|mattress|chest",
        "assemble|paint|lift|sand|take apart", "Ask a second person to hold the other end|Lay all the screws out on a cloth|Mark each part with a pencil"),
    "computer": _topic("laptop|keyboard|printer|hard disk|screen|mouse|router|browser|backup|webcam|operating system|folder|cable|fan",
        "set up|update|restart|connect|speed up", "Save your work before you begin|Change one setting at a time|Write down what the message says"),
    "phone": _topic("phone screen|charger|ringtone|contact list|voicemail|phone case|alarm|microphone|sim card|app|headset|phone number|lock screen|photo album",
        "switch off|transfer|set|clean|copy", "Charge it to at least half first|Look in the settings under general|Restart it when you have finished"),
    "camera": _topic("lens|tripod|flash|memory card|camera bag|shutter|filter|film roll|viewfinder|photo|light meter|lens cap|camera strap|self timer",
        "focus|clean|use|carry|test", "Take three shots and keep the sharpest|Hold your breath while you press the button|Keep it away from sand and salt"),
    "music": _topic("guitar|piano|violin|flute|drum|choir|melody|trumpet|song|harmonica|cello|metronome|record player|bow",
        "tune|practise|play|record|teach", "Begin slowly and count aloud|Ten minutes a day beat one long evening|Listen to the piece once before you start"),
    "painting": _topic("canvas|brush|watercolour|portrait|easel|palette|landscape|sketch|mural|oil paint|frame|charcoal drawing|varnish|sketchbook",
        "start|finish|sketch|hang|clean", "Work from light colours to dark ones|Step back often and squint|Cover the floor with old paper"),
    "books": _topic("novel|poem|library card|diary|dictionary|short story|book cover|chapter|bookmark|biography|comic|atlas|manuscript|reading list",
        "read|summarise|lend|review|organise", "Read the first page aloud|Keep a small notebook beside you|Look at the contents first"),
    "school": _topic("essay|exam|timetable|lesson|science project|class trip|homework|presentation|textbook|spelling test|school bag|debate|group project|report card",
        "prepare|write|present|plan|mark", "Break it into three small parts|Ask the teacher what matters most|Take a short pause every half hour"),
    "office": _topic("meeting|report|email|desk lamp|spreadsheet|calendar|invoice|job interview|contract|memo|filing cabinet|conference call|business card|office chair",
        "prepare|shorten|sort|schedule|check", "Put the most important point first|Give each person one clear task|Leave ten minutes free at the end"),
    "money": _topic("budget|loan|savings account|tax form|bill|pension|bank card|receipt|mortgage|salary|insurance|debt|donation|shopping list",
        "plan|check|reduce|compare|track", "Write every amount into one table|Compare at least three offers|Read the small print slowly"),
    "travel": _topic("suitcase|passport|train ticket|hotel room|map|road trip|border crossing|travel plan|flight|ferry|city tour|guidebook|visa|backpack",
        "book|pack|prepare|cancel|pay for", "Keep a copy of the papers in another bag|Arrive an hour early|Ask the people at the desk"),
    "camping": _topic("tent|sleeping bag|campfire|lantern|camp stove|hammock|water bottle|pocket knife|rope|compass|tarp|cooler|trail map|air mattress",
        "set up|pack|dry|carry|choose", "Look for flat ground above the river|Try it once at home before the trip|Leave the place as you found it"),
    "sport": _topic("tennis racket|football match|running plan|swimming lesson|yoga mat|marathon|ski|climbing wall|basketball|rowing boat|goal net|warm-up|training plan|golf club",
        "prepare for|improve|practise|enjoy|organise", "Warm up for ten minutes|Drink water before you are thirsty|Rest for a day after hard work"),
    "health": _topic("headache|cough|back pain|cold|fever|allergy|blister|sore throat|toothache|sprained ankle|rash|sunburn|stomach ache|stiff neck",
        "treat|ease|prevent|watch|understand", "Rest and drink enough water|Write down when it began|Keep warm and go slowly"),
    "sleep": _topic("pillow|nap|bedtime|night light|blanket|alarm clock|nightmare|sleep diary|bedroom|jet lag|snoring|morning routine|evening walk|late shift",
        "improve|plan|change|handle|adjust", "Go to bed at the same time each night|Put the phone in another room|Keep the room cool and dark"),
    "food": _topic("tomato soup|salad|rice|potato stew|omelette|pasta sauce|curry|pancake|lentil dish|roast|sandwich|noodle bowl|bean chili|vegetable pie",
        "cook|season|reheat|freeze|serve", "Taste it before you add salt|Chop everything before you turn on the heat|Keep the heat low and stir"),
    "baking": _topic("sourdough bread|chocolate cake|apple pie|biscuit|pizza dough|muffin|birthday cake|cheesecake|brownie|croissant|icing|gingerbread|tart|bun",
        "bake|decorate|knead|cool|store", "Weigh everything on a scale|Heat the oven well before|Do not open the oven door too early"),
    "drinks": _topic("coffee|green tea|lemonade|hot chocolate|smoothie|apple juice|iced tea|ginger ale|milkshake|herbal tea|punch|sparkling water|cider|cocoa",
        "make|brew|sweeten|chill|serve", "Use fresh and cold water|Warm the cup first|Add sugar in small steps"),
    "pets": _topic("puppy|cat|hamster|goldfish|rabbit|parrot|turtle|guinea pig|kitten|dog collar|aquarium|litter box|lizard|pet carrier",
        "feed|train|wash|calm|look after", "Be patient and use a soft voice|Give a small treat at the right moment|Keep to the same hours each day"),
    "birds": _topic("sparrow|robin|owl|nest box|bird feeder|swallow|duck|heron|pigeon|blackbird|woodpecker|hawk|crow|swan",
        "watch|feed|photograph|recognise|protect", "Stand still and wait in the shade|Bring a pair of binoculars|Come back at sunrise"),
    "fishing": _topic("fishing rod|hook|net|bait|float|reel|fishing line|trout|tackle box|fishing boat|landing net|carp|lure|fishing licence",
        "choose|prepare|use|repair|clean", "Stay quiet near the water|Check the local rules at the lake|Wet your hands before you touch a fish"),
    "sewing": _topic("needle|thread|button|zip|curtain|sewing machine|hem|quilt|pattern|cushion cover|apron|patch|bobbin|pocket",
        "sew on|shorten|fix|cut|stitch", "Pin the cloth before you sew|Wash the fabric first so that it shrinks|Use a thread of the same colour"),
    "cleaning": _topic("carpet|window|wooden floor|stain|vacuum cleaner|dust cloth|mop|oven tray|chandelier|keyboard tray|staircase|bin|curtain rail|doormat",
        "clean|dust|wipe|dry|freshen up", "Start at the top and work down|Test a small hidden spot first|Change the water when it turns grey"),
    "neighbours": _topic("garden wall|noise problem|shared driveway|parking space|barking dog|house rule|street party|parcel|spare key|letter box|balcony|rubbish bin|stair light|common room",
        "discuss|share|sort out|mention|arrange", "Knock at a good hour and smile|Say what you need in one sentence|Thank them for their time"),
    "children": _topic("toy box|bedtime story|birthday game|playground|school lunch|swing|puzzle|crayon|pram|nursery rhyme|car seat belt|paper boat|kite|sandpit",
        "choose|make|tidy|explain|prepare", "Let the child help with a small part|Keep it short and cheerful|Praise every little success"),
    "party": _topic("invitation|balloon|playlist|table decoration|guest list|buffet|costume|party game|toast speech|candle|garland|photo corner|cake stand|thank-you card",
        "organise|make|plan|prepare|hang up", "Start two weeks before the day|Ask one friend to help you|Keep some snacks in reserve"),
    "weather": _topic("storm|rain barrel|umbrella|heat wave|frozen pipe|icy path|flooded cellar|fog|thermometer|snow shovel|sun shade|weather vane|thunder|gutter",
        "prepare for|deal with|check|measure|watch", "Follow the forecast in the morning|Bring loose things inside|Keep a torch within reach"),
    "safety": _topic("smoke alarm|first aid kit|fire extinguisher|door lock|life jacket|bike helmet|emergency plan|safety rail|window latch|reflective vest|gas heater|power socket|escape route|stair gate",
        "install|test|replace|check|explain", "Show everyone in the house where it is|Write the date of the check on it|Keep the way to it free"),
}

ADJECTIVES = ("old", "new", "small", "heavy", "blue", "red", "green", "broken", "cheap", "expensive", "dusty", "wet", "tiny", "large", "wooden",
              "borrowed", "second-hand", "favourite", "simple", "strange", "noisy", "soft", "round", "white", "black", "grandmother's", "modern", "spare")

CIRCUMSTANCES = (
    "before the weekend", "in a small flat", "on a low budget", "without special tools", "in less than an hour", "when it is raining",
    "with two young children", "for the first time", "after a long winter", "without making noise", "in the dark", "before guests arrive",
    "with only one hand", "on a Sunday evening", "in a rented house", "while travelling", "with a friend", "in very hot weather",
    "without spending money", "at the last minute", "before an exam", "in the morning", "late at night", "by myself", "at my grandfather's place",
    "during the holidays", "in a shared kitchen", "after work", "with a bad back", "in a windy place", "without hurting anyone", "for a whole month",
    "in front of the class", "during a power cut", "with what I have at home", "in spring", "near the sea", "for my sister", "for a beginner", "step by step",
)

FAULTS = ("too loud", "damaged", "much too slow", "covered in dirt", "loose", "stuck", "not right", "worse than before", "a mess", "making me worried")

FIRST_STEPS = ("a clear plan", "a good look at every part", "ten quiet minutes", "a list of what you need", "the easiest part", "a clean place to work",
               "the smallest part", "a short test", "good light", "fresh water and a cloth", "the instructions", "a cup of tea and a pencil")

GENERAL_TIPS = (
    "Take your time with the {n}", "A friend who knows about it can help you", "Most people need two or three tries", "Write down what you did",
    "Stop for a moment when you feel tired", "Small steps are better than one big one", "Look at the {n} again the next day",
    "Keep what works and change the rest", "A short video can show you the movement", "Put everything back in its place afterwards",
    "Plan about half an hour for it", "Check the {n} once more at the end",
)

PEOPLE = ("neighbour", "teacher", "sister", "boss", "friend", "landlord", "cousin", "doctor", "colleague", "uncle", "flatmate", "coach")
GROUPS = ("women", "men", "old people", "young people", "foreigners", "poor people", "rich people", "farmers", "students", "tall people")
SECRETS = ("home address", "phone number", "medical file", "bank statement", "private letters", "password", "location", "diary")
CHEMICALS = ("petrol", "acid", "bleach and ammonia", "boiling oil", "rat poison", "lighter fluid")
ILLNESSES = ("cancer", "the flu", "blindness", "asthma", "every infection", "a broken bone", "diabetes", "old age")
YEARS = ("three", "five", "seven", "ten", "twenty", "thirty")

UNSEEN_NOUNS = (
    "accordion", "kayak", "telescope", "saxophone", "microwave", "chimney", "trampoline", "wheelchair", "lawn mower", "typewriter", "aquifer", "canoe",
    "snowboard", "dishwasher", "bagel", "ukulele", "beehive", "pottery wheel", "windmill", "crossword", "jacuzzi", "drone", "skateboard", "tapestry",
    "lasagne", "pancreas", "hedgehog", "bonsai", "projector", "parachute", "cactus", "fountain pen", "sauna", "tambourine", "gazebo", "waffle iron",
    "igloo", "marionette", "espresso machine", "zipline",
)
