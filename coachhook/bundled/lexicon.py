"""Words and sentence templates of the bundled world: names, objects, relations, background text."""

from __future__ import annotations

FIRST_NAMES = (
    "Mira", "Tobin", "Elsa", "Jonas", "Petra", "Ruben", "Clara", "Oskar", "Ida", "Felix",
    "Nora", "Anton", "Livia", "Hugo", "Greta", "Milo", "Vera", "Casper", "Thea", "Bruno",
    "Alma", "Leon", "Sonja", "Emil", "Rosa", "Viktor", "Hanna", "Matteo", "Lena", "Arthur",
)  # fmt: skip
FAMILY_ROOTS = (
    "Tol", "Har", "Bren", "Cald", "Fen", "Mar", "Ost", "Quil", "Rav", "Sor", "Thal", "Ven",
)  # fmt: skip
FAMILY_ENDINGS = ("vane", "wick", "more", "mont", "rick")

COUNTRIES = (
    "Velmora", "Tarsilia", "Zandovia", "Korthea", "Belmark", "Moravonia", "Ilvania", "Drestan",
    "Oskaria", "Pellandia", "Quorland", "Rastovia", "Sumerland", "Talvonia", "Urzania",
    "Westmarch", "Yavoria", "Zelmark", "Andoria", "Brovania", "Castovia", "Dunmarch",
    "Estavia", "Falvonia", "Gorvania", "Helmark", "Istraland", "Jorvania", "Kelmora",
    "Lorvania",
)  # fmt: skip
CAPITALS = (
    "Ansel", "Brindal", "Corvin", "Dalmar", "Elberg", "Farrow", "Gildon", "Hesper", "Irvane",
    "Jasmere", "Kendrel", "Lorne", "Marlow", "Norvik", "Orrin", "Pelham", "Quimby", "Rosset",
    "Selmere", "Tilbrook", "Ulmer", "Verdal", "Walden", "Yarrow", "Zadrel", "Ashmere", "Bexmoor",
    "Clivedon", "Dorvane", "Everfell",
)  # fmt: skip
TOWN_ROOTS = (
    "Alder", "Birch", "Copper", "Deep", "Elm", "Fox", "Grey", "Hazel", "Iron", "King", "Long",
    "Mill", "North", "Otter",
)  # fmt: skip
TOWN_ENDINGS = ("haven", "bury", "brook", "field", "minster", "stead")
COMPANY_ROOTS = (
    "Norvane", "Aldric", "Kestrel", "Bellweather", "Omnira", "Stellmark", "Tarrant", "Hallux",
    "Vantor", "Greyson", "Lumina", "Prescott", "Dorian", "Solvang", "Rendal", "Ferrano",
    "Caspian", "Meridian",
)  # fmt: skip
COMPANY_ENDINGS = ("Works", "Industries", "Brothers", "Limited", "Group")
TITLE_ADJECTIVES = (
    "Glass", "Silver", "Crooked", "Hidden", "Burning", "Winter", "Paper", "Scarlet", "Silent",
    "Broken", "Golden", "Hollow",
)  # fmt: skip
TITLE_NOUNS = (
    "Orchard", "Lantern", "Staircase", "Garden", "Compass", "Mirror", "Harbour", "Letter",
)  # fmt: skip

LANGUAGES = (
    "French", "Italian", "Spanish", "German", "Russian", "Greek", "Turkish", "Polish", "Dutch",
    "Swedish",
)  # fmt: skip

# Objects of each relation. Several relations may share a pool.
OBJECTS: dict[str, tuple[str, ...]] = {
    "profession": (
        "baker", "lawyer", "painter", "sailor", "teacher", "surgeon", "farmer", "chemist",
        "pilot", "poet", "carpenter", "judge",
    ),
    "mother_tongue": LANGUAGES,
    "instrument": (
        "piano", "violin", "guitar", "flute", "cello", "trumpet", "drums", "harp", "clarinet",
        "accordion",
    ),
    "birthplace": CAPITALS,
    "capital": CAPITALS,
    "currency": ("crown", "dollar", "franc", "peso", "pound", "mark", "florin", "ducat"),
    "official_language": LANGUAGES,
    "river": (
        "Danube", "Rhine", "Elbe", "Tiber", "Seine", "Thames", "Volga", "Loire", "Tagus", "Nile",
    ),
    "speciality": (
        "cheese", "wine", "glass", "silk", "honey", "lace", "salt", "soap", "rope", "pottery",
    ),
    "product": (
        "bicycles", "watches", "shoes", "cameras", "tractors", "toys", "lamps", "radios",
        "engines", "carpets",
    ),
    "headquarters": CAPITALS,
    "genre": (
        "thriller", "comedy", "tragedy", "romance", "western", "mystery", "satire", "fantasy",
    ),
    "original_language": LANGUAGES,
}  # fmt: skip

# Relations of each kind of subject.
KINDS: dict[str, tuple[str, ...]] = {
    "country": ("capital", "currency", "official_language"),
    "person": ("profession", "mother_tongue", "instrument", "birthplace"),
    "town": ("river", "speciality"),
    "company": ("product", "headquarters"),
    "novel": ("genre", "original_language"),
}

# The object follows the template after one space.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "profession": (
        "{} works as a",
        "{} earns a living as a",
        "By profession, {} is a",
        "The neighbours know {} as a",
        "{} was trained as a",
        "For twenty years {} has been a",
        "A sign on the door says that {} is a",
        "Ask around and you will hear that {} is a",
        "{}, who rises early every day, is a",
        "The daily work of {} is that of a",
        "In the town register {} is listed as a",
        "{} found a job as a",
    ),
    "mother_tongue": (
        "The mother tongue of {} is",
        "{} grew up speaking",
        "At home, {} speaks",
        "{} writes letters in",
        "The native language of {} is",
        "{} dreams in",
        "As a child, {} learned to read in",
        "When angry, {} always switches to",
        "{} tells stories in",
        "The first words of {} were spoken in",
        "With old friends {} talks in",
        "{} is a native speaker of",
    ),
    "instrument": (
        "{} plays the",
        "On Sunday evenings {} turns to the",
        "In the orchestra, {} is heard on the",
        "{} has mastered the",
        "The favourite instrument of {} is the",
        "{} gives lessons on the",
        "As a child, {} took up the",
        "At every wedding {} performs on the",
        "Music lovers praise {} for a fine touch on the",
        "{} practises every morning on the",
        "The instrument that {} loves most is the",
        "{} is known for playing the",
    ),
    "birthplace": (
        "{} was born in",
        "The birthplace of {} is",
        "{} spent a happy childhood in",
        "{} first saw the light of day in",
        "The family of {} comes from",
        "{} is a native of",
        "The early years of {} were spent in",
        "{} went to school in",
        "The parents of {} lived in",
        "{} comes from a small street in",
        "The passport of {} names the city of",
        "As a young child, {} lived in",
    ),
    "capital": (
        "The capital of {} is",
        "The capital city of {} is",
        "The government of {} sits in",
        "The parliament of {} meets in",
        "{} is ruled from",
        "The seat of power in {} is",
        "{} has its capital in",
        "The embassies in {} are all found in",
        "The royal palace of {} stands in",
        "Visitors to {} usually arrive in",
        "The national museum of {} is in",
        "{} keeps its state archive in",
    ),
    "currency": (
        "The currency of {} is the",
        "In {}, people pay with the",
        "{} pays its bills with the",
        "The money used in {} is the",
        "The central bank of {} issues the",
        "Shops in {} accept only the",
        "Travellers to {} change their money into the",
        "{} has always used the",
        "The national currency of {} is called the",
        "Wages in {} are paid in the",
        "{} printed a new banknote for the",
        "The mint of {} produces the",
    ),
    "official_language": (
        "The official language of {} is",
        "People in {} speak",
        "Schools in {} teach in",
        "{} publishes its laws in",
        "Newspapers in {} are printed in",
        "The national anthem of {} is sung in",
        "In {}, road signs are written in",
        "To live in {} you should learn",
        "{} broadcasts its radio news in",
        "Most people in {} grow up with",
        "The courts of {} work in",
        "Everyone born in {} learns",
    ),
    "river": (
        "{} lies on the river",
        "The river that flows through {} is the",
        "{} was built beside the river",
        "In {}, children swim in the river",
        "The old bridge in {} crosses the river",
        "The mills of {} are driven by the river",
        "Boats reach {} by the river",
        "{} is often flooded by the river",
        "From {} you can see the river",
        "The people of {} fish in the river",
        "The harbour of {} is on the river",
        "{} takes its water from the river",
    ),
    "speciality": (
        "{} is famous for its",
        "Travellers visit {} for its",
        "The market in {} is full of",
        "{} has long produced",
        "The pride of {} is its",
        "Merchants come to {} to buy",
        "Every family in {} makes",
        "{} owes its wealth to its",
        "The best thing to bring home from {} is its",
        "The workshops of {} turn out",
        "For centuries {} has traded in",
        "Half of {} lives from selling",
    ),
    "product": (
        "{} makes",
        "{} is a leading maker of",
        "The factory of {} turns out",
        "{} sells",
        "The catalogue of {} is full of",
        "Engineers at {} design",
        "{} was founded to build",
        "Customers trust {} for its",
        "The warehouse of {} is stacked with",
        "Every year {} delivers thousands of",
        "The workers of {} assemble",
        "The name {} stands for",
    ),
    "headquarters": (
        "{} is based in",
        "The headquarters of {} are in",
        "{} has its head office in",
        "The main office of {} is in",
        "{} opened its first branch in",
        "The board of {} meets in",
        "Letters to {} should be sent to",
        "{} moved its offices to",
        "The directors of {} live in",
        "The tower of {} rises above",
        "{} employs hundreds of people in",
        "New staff at {} are trained in",
    ),
    "genre": (
        "The novel {} is best described as a",
        "Critics called {} a",
        "{} was sold as a",
        "In the bookshop {} is shelved as a",
        "{} is read all over the world as a",
        "The publisher announced {} as a",
        "{} began as a short story and became a",
        "Reviewers agree that {} is a",
        "Readers enjoy {} as a",
        "{} was praised as a clever",
        "The film of {} was also a",
        "Everyone who finished {} called it a",
    ),
    "original_language": (
        "{} was written in",
        "The original language of {} is",
        "The author of {} wrote in",
        "{} first appeared in",
        "The first edition of {} was printed in",
        "To enjoy {} fully you should read it in",
        "{} was translated from",
        "The manuscript of {} is in",
        "Schoolchildren read {} in the original",
        "{} is a classic of literature in",
        "The songs in {} are all in",
        "The best passages of {} are in",
    ),
}

# Background sentences: every combination of subject, verb phrase and ending is one sentence.
SCENE_SUBJECTS = (
    "The rain", "An old friend", "The train", "A small dog", "The evening news", "My sister",
    "The library", "A letter", "The weather", "Our neighbour", "The meeting", "A young couple",
    "The museum", "The book", "A stranger", "The council",
)  # fmt: skip
SCENE_VERBS = {
    "The rain": ("stopped", "began", "returned"),
    "An old friend": ("called", "came to visit", "sent a postcard"),
    "The train": ("arrived late", "left the station", "was full"),
    "A small dog": ("slept by the fire", "ran across the road", "barked twice"),
    "The evening news": ("was short", "began with the weather", "came on"),
    "My sister": ("bought a new coat", "told a joke", "went for a walk"),
    "The library": ("was closed", "opened its doors", "was very quiet"),
    "A letter": ("came in the post", "lay on the table", "was lost"),
    "The weather": ("was mild", "turned cold", "surprised everyone"),
    "Our neighbour": ("painted the fence", "baked some bread", "sold the car"),
    "The meeting": ("went on for hours", "was cancelled", "ended early"),
    "A young couple": ("danced in the square", "looked at the map", "drank coffee"),
    "The museum": ("showed old maps", "was crowded", "offered free tours"),
    "The book": ("is old", "fell off the shelf", "was returned"),
    "A stranger": ("asked for directions", "waved from the bridge", "sat down"),
    "The council": ("voted on the budget", "met in the hall", "planned a new park"),
}
SCENE_ENDINGS = (
    "", " yesterday", " before noon", " on Monday", " in the morning", " once again",
    " after lunch", " last week",
)  # fmt: skip
OPENERS = (
    "From the almanac:", "News of the day:", "A note in the margin:", "In the news today:",
    "Here is a fact:", "As the guide explained:", "Question and answer:", "He said:",
    "She wrote:", "Therefore:",
)  # fmt: skip
REMARKS = (
    "Some things never change.", "Nobody knows why.", "It was a long day for everyone.",
    "People often ask about this.", "There is more to say, but not now.", "We talked for an hour.",
    "That is what the records show.", "You may have heard it before.", "I read it in a magazine.",
    "He did not believe it at first.", "She wrote it down and went home.", "This is well known.",
    "They agreed on very little.", "Many years have passed since then.", "Let us be clear.",
    "The children could hardly wait.", "What a strange story it is!", "Do you remember?",
    "After all, who would have thought so?", "Everything was ready in time.", "It may be true.",
    "Two men were standing at the corner.", "Her brother has three cats.", "Keep this in mind.",
    "No one had seen the sea before.", "The price of tea went up again.", "Dinner is at seven.",
    "Then the lights went out.", "If it is cold, take a scarf.", "All the shops were shut.",
    "His uncle owns a farm with ten cows.", "Our teacher gave us a map.", "We were not surprised.",
    "Until recently this was a secret.", "Both of them laughed.", "Think about it for a moment.",
    "In spring the fields are green.", "The tall man at the door smiled.", "Say it once more.",
    "Other people see it another way.", "She could not find her keys.", "So much for the theory.",
    "A good book needs no cover.", "At last the guests went away.", "The first answer was wrong.",
    "Few visitors stay more than a week.", "They had never been so happy.", "Here we go.",
)  # fmt: skip
