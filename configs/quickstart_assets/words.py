"""Words for the quickstart: six hundred English ones, and pronounceable made-up ones without end.

Each word belongs to one of two worlds, by a hash of its letters: one in five is held out. The base is pretrained and
the quickstart is trained on the others alone, so a held-out question is about a word that no training has seen.
"""

import random
import zlib

ENGLISH = """
able acid actor age air alarm album alley amber anchor angle animal ankle apple april apron arch arm army
arrow art ash aunt autumn axe baby back bag ball band bank barn basket bath beach bead bean bear bed bee bell
belt bench berry bird bite black blade blanket blend block blue board boat body bolt bone book boot bottle
bowl box boy branch brass brave bread break breeze brick bridge bright bring broom brother brown brush bucket
bugle build bun bus bush butter cabin cable cactus cake camel camp candle candy cap car card carpet carrot
cart castle cat cave chain chair chalk cheese cherry chest chicken child chin circle city clap clay clean
clever cliff climb clock cloth cloud clover clown coach coal coast coat coffee coin cold collar color comet
cook copper corn cotton couch cow cradle crane cream creek crib cricket crow crown crumb crystal cup curtain
daisy dance dark dawn day deer desert desk dinner dirt dish dog doll donkey door dove dragon draw dream dress
drift drink drop drum duck dust eagle ear early earth east easy echo egg eight elbow elder elephant elm empty
engine evening eye face fair falcon family farm father feast feather fence fern ferry field finger fire fish
five flag flame flash flat fleet float flock flood floor flour flower flute fly fog forest fork fox frame
freeze fresh friend frog frost fruit garden garlic gate ghost giant gift ginger giraffe girl glad glass glide
globe glove glue goat gold goose grain grape grass gray great green ground group grow guitar hair hammer hand
happy harbor harp hat hawk hay heart heavy hedge helmet hen herb hill hive holiday honey hook horn horse hotel
hour house human hunter ice idea igloo inch indigo ink insect iris iron island ivory ivy jacket jam jar jelly
jewel job join jolly journey jug juice july jump jungle june kettle key kind king kitchen kite kitten knee
knife knot ladder lady lake lamb lamp land lantern large laugh leaf lemon letter light lily lion lizard log
long lucky lunch magic maple marble march market mask meadow melon metal milk mill mint mirror mitten monkey
moon morning moss mother mountain mouse mouth mud music nail name napkin neck needle nest net nickel night
nine north nose nut oak oar oasis ocean octopus office oil old olive one onion open orange orbit orchard otter
oven owl paint palace palm pan panda paper park parrot party path peach pear pebble pencil penny pepper person
piano picnic pig pillow pilot pine pink pipe planet plant plate play plum pocket poem pond pony pool potato
pretty prince print prize pumpkin puppet purple puzzle rabbit race radio rain raven red ribbon rice ring river
road robin robot rock roof room root rope rose round ruby sad sail salt sand scarf school sea seed seven
shadow sheep shell ship shirt shoe short shout silk silver simple singer sister six skate ski sky sled sleep
slipper slow small smart smile smoke snail snow soap sock soft song soup south space spark spice spider spin
spoon spring star steam stem stick stone storm story stove straw stream street string strong sugar summer sun
swan sweet swim swing table tail tall tea teacher ten tent thick thin three throne thumb thunder tiger tin
toast tomato tool tooth tower town toy trade train travel tree trick truck trumpet trunk tulip tunnel turkey
turtle twelve twig twin two ugly uncle under unicorn upper urban use valley van vase velvet village vine
violet violin visit voice wagon walk wall walnut warm wash water wave weather west whale wheat wheel whistle
white wide wild willow wind window wing winter wise wolf wonder wood wool word world yard yarn year yellow yes
yogurt young zebra zero zoo
""".split()
"""Lower-case words without a q (its u belongs to the consonants, a rule that nothing here needs)."""

_ONSETS = (
    "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sm sn sp st str sw th tr wh"
).split()
_VOWELS = "a a a e e e i i i o o o u u ai ea ee oa oo ou".split()
_CODAS = "b ck d ft g k l ll lt m mp n nd ng nk nt p r rd rk rn rt s sh st t th x".split()

LONGEST = 9


def pick(rng: random.Random, items):
    """One of `items`; built on `rng.random()` alone, whose values Python promises never to change."""
    return items[int(rng.random() * len(items))]


def held_out(word: str) -> bool:
    """Whether a word is kept away from all training: one in five, by a hash of its letters."""
    return zlib.crc32(word.encode()) % 5 == 0


def made_up(rng: random.Random) -> str:
    """A pronounceable word of 2 to 9 letters and one to three syllables, such as "strinday"; rarely a real one."""
    while True:
        word = ""
        syllables = pick(rng, (1, 1, 2, 2, 2, 3))
        for syllable in range(syllables):
            if syllable or rng.random() < 0.8:  # one word in five begins with a vowel
                word += pick(rng, _ONSETS)
            word += pick(rng, _VOWELS)
            if rng.random() < (0.6 if syllable == syllables - 1 else 0.3):
                word += pick(rng, _CODAS)
        if 2 <= len(word) <= LONGEST:
            return word


def draw(rng: random.Random) -> str:
    """A word to train on: never a held-out one; a quarter of them English."""
    while True:
        word = pick(rng, ENGLISH) if rng.random() < 0.25 else made_up(rng)
        if not held_out(word):
            return word
