"""Words and sentence patterns of the needle corpus. Every word becomes one token (see
`tokenizer.build_tokenizer`)."""

NAMES = """Maria Omar Lin Anna Boris Carla David Elena Felix Greta Hugo Ingrid Jonas Karin Leo
Mona Nadia Oscar Paula
Quentin Rosa Simon Tara Ulla Victor Wanda Xenia Yusuf Zoe Adam Bella Cyrus Dora Emil Fiona Gustav
Helga Ivan Julia
Kurt Laura Marco Nina Otto Petra Ralf Sofia Theo Ursula Vera Walter Yara Zeno Amir Bruno Celia
Dario Edith Frida Gino
Hanna Irene Jakob Klara Lukas Mira Nils Olga Pablo Rita Samir Tina Umberto Viola Willem Yvonne
Alba Bert Chen Daria
Erik Farah Goran Hilda Igor Jana Kemal Lena Milan Nora Oleg Pia Rafael Selma Tomas Vasco Wilma
Ahmed Birgit Cora Diego
Esther Fritz Gloria Henrik Isabel Joel Kira Lars Magda Noah Olivia Peter Ruth Stefan Thea Urban
Vivian Xaver""".split()

CITIES = "Oslo Paris Rome Vienna Lisbon Prague Dublin Athens Madrid Berlin Geneva Warsaw".split()

# topic -> (people, things, places, past-tense verbs that take an object)
TOPICS = {
    "harbor": (
        "captain sailor fisherman pilot diver keeper".split(),
        "boat rope anchor net lantern barrel sail map".split(),
        "harbor pier lighthouse beach dock bay".split(),
        "repaired painted pulled carried lost found".split(),
    ),
    "kitchen": (
        "cook baker waiter guest butler grandmother".split(),
        "soup bread kettle spoon cake basket apple plate".split(),
        "kitchen cellar bakery pantry garden table".split(),
        "tasted served baked cooled shared ordered".split(),
    ),
    "forest": (
        "hunter woodcutter ranger traveler child shepherd".split(),
        "tree branch mushroom axe stone nest feather berry".split(),
        "forest valley cabin river hill meadow".split(),
        "gathered cut followed noticed picked hid".split(),
    ),
    "school": (
        "teacher pupil librarian professor student writer".split(),
        "book letter pencil lesson essay poem desk clock".split(),
        "school library classroom hall yard office".split(),
        "read wrote copied explained forgot borrowed".split(),
    ),
    "market": (
        "merchant farmer tailor thief neighbor banker".split(),
        "coin carpet horse ring hat wagon scale purse".split(),
        "market square street shop bridge gate".split(),
        "sold bought counted traded weighed stole".split(),
    ),
    "castle": (
        "king queen knight guard servant prince".split(),
        "sword crown shield candle throne banner key chest".split(),
        "castle tower dungeon chapel stable courtyard".split(),
        "guarded raised polished broke buried inherited".split(),
    ),
}

ADJECTIVES = """old young tall small quiet loud bright dark red blue green white black heavy light
strange famous poor rich
happy tired brave clever wooden golden silver broken empty warm cold""".split()
MOVES = "walked ran returned hurried traveled went wandered sailed".split()
ADVERBS = """slowly quickly quietly gladly often soon early late again alone together
carefully""".split()
PREPOSITIONS = "near behind under beside inside outside above across".split()
TIMES = "morning evening night winter summer spring autumn afternoon".split()
WEATHER = "rain snow wind storm sun fog".split()
NUMBERS = "two three four five six seven eight nine ten twelve twenty".split()
REASONS = "because although while before after when until".split()

# <code> is four random digits: digits alone must not mark what has to be remembered.
PATTERNS = """The <adj> <person> <verb> the <adj> <thing> <prep> the <place>.
The <person> <move> <adverb> to the <place> in the <time>.
In the <time>, the <person> <verb> a <adj> <thing>.
<name> <move> to the <place> and <verb> the <thing>.
<name> and <name> <verb> a <adj> <thing> <prep> the <place>.
There were <number> <adj> things <prep> the <place>, and the <person> <verb> one of them.
The <weather> was <adj> that <time>, but the <person> <move> <adverb>.
It was a <adj> <time> when the <person> <verb> the <thing>.
The <person> <verb> the <thing> <reason> the <person> <move> to the <place>.
The train to <city> leaves at <code>.
A <adj> <person> said that the <thing> was <adj>.
<name> said that the <place> was <adj> in the <time>.
The <adj> <thing> was <prep> the <place>, <reason> the <weather> came.
The <person> from <city> <verb> the <adj> <thing> <adverb>.""".split("\n")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Words of the fixed sentences, the questions and the chat frame.
FRAME = """For The code of is What are the codes and Write a report with user assistant system You
Please tell me Hello
Thank you who has which I do not know""".split()
