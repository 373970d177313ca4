"""Tables of what answers are written with: signs, command names, functions, units, number words. Nothing but data."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi"
GREEK = (*_words(GREEK), "omega")
CAPITALS = ("Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega")

# Signs and how LaTeX writes them; the spaces keep neighbours apart.
UNICODE = {
    **dict.fromkeys("−–—", "-"),
    **dict.fromkeys("×✕⋅·∙∗", " \\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **{"≤": " \\le ", "≥": " \\ge ", "≠": " \\ne ", "≈": " \\approx ", "≡": " \\equiv ", "∈": " \\in ", "±": " \\pm "},
    **{"∓": " \\mp ", "∪": " \\cup ", "∩": " \\cap ", "∞": " \\infty ", "∅": " \\emptyset ", "∠": " \\angle "},
    **{"√": " \\sqrt ", "∛": " \\sqrt[3] ", "∨": " \\vee ", "∧": " \\wedge ", "→": " \\to ", "…": " \\ldots "},
    **{"⟨": " \\langle ", "⟩": " \\rangle ", "⌊": " \\lfloor ", "⌋": " \\rfloor ", "⌈": " \\lceil ", "⌉": " \\rceil "},
    **{
        "°": "^\\circ ",
        "′": "'",
        "’": "'",
        "€": " \\$ ",
        "£": " \\$ ",
        "¥": " \\$ ",
        "₹": " \\$ ",
        "¢": " \\text{cents} ",
    },
    **{chr(0xFF01 + n): chr(0x21 + n) for n in range(94)},  # full-width forms of ASCII
    **{sign: f" \\{name} " for sign, name in zip("αβγδεζηθικλμνξπρστυφχψω", GREEK)},
    **{sign: f" \\{name} " for sign, name in zip("ΓΔΘΛΞΣΦΨΩ", CAPITALS)},
}
VULGAR = {"¼": (1, 4), "½": (1, 2), "¾": (3, 4), "⅓": (1, 3), "⅔": (2, 3), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5)}
VULGAR |= {"⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8)}
UNICODE |= {sign: f" \\frac{{{above}}}{{{below}}} " for sign, (above, below) in VULGAR.items()}
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n"))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))

# What people type without a backslash.
KEYBOARD_SIGNS = {"**": "^", "<=": " \\le ", ">=": " \\ge ", "!=": " \\ne ", "+/-": " \\pm ", "->": " \\to "}
KEYBOARD_NAMES = {name: name for name in (*GREEK, *CAPITALS)} | dict.fromkeys(
    ("infinity", "infty", "inf", "oo"), "infty"
)
INVERSES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
FUNCTIONS = _words(
    "asin acos atan sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp abs floor ceil sqrt"
)

# Commands that mean another; a value that starts with no letter is a sign.
COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("cdot", "times", "ast"), "*"),
    **{"div": "/", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "varnothing": "emptyset"},
    **{"lbrace": "\\{", "rbrace": "\\}", "{": "\\{", "}": "\\}", "lbrack": "[", "rbrack": "]", "%": "%"},
    **{"lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "colon": ":", "lt": "<", "gt": ">"},
    **{"varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta", "imath": "i", "degree": "circ"},
}
SPACES = (
    *_words("quad qquad enspace thinspace ; : > ! , ( ) [ ] $ ~ displaystyle textstyle pounds euro yen textdollar"),
    " ",
)
SIZES = _words("left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr limits")
WORDS = _words("text mathrm mbox textbf textit textrm mathbf operatorname hbox emph texttt mathit mathsf textnormal")
CURRENCY_CODES = _words("US AU CA USD EUR GBP INR JPY CNY AUD CAD CHF Rs")
APPROXIMATE = _words("approximately about around roughly approx nearly exactly")

# How much a word multiplies the number before it, and which part of one it is.
FACTORS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
FACTORS |= {"gross": 144, "lakh": 10**5, "crore": 10**7, "score": 20}
FACTORS |= {f"{name}s": value for name, value in FACTORS.items()}
PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
PARTS |= {"ninth": 9, "tenth": 10, "twelfth": 12, "twentieth": 20, "hundredth": 100, "thousandth": 1000, "halve": 2}
PARTS |= {f"{name}s": value for name, value in PARTS.items()}
NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety once twice thrice double triple pair"
)

# Units by their names. A unit may be left out of an answer, but not contradict the gold answer's.
_UNITS = """
mm millimeter millimeters millimetre millimetres|cm centimeter centimeters centimetre centimetres
m meter meters metre metres|km kilometer kilometers kilometre kilometres|inch inches in|ft foot feet|yd yard yards
mi mile miles|mg milligram milligrams|g gram grams|kg kilogram kilograms kilo kilos|oz ounce ounces
lb lbs pound pounds|ton tons tonne tonnes|ml mL milliliter milliliters millilitre millilitres
L l liter liters litre litres|gal gallon gallons|quart quarts|pint pints|cup cups|s sec secs second seconds
min mins minute minutes|h hr hrs hour hours|day days|week weeks|month months|year years yr yrs|dollar dollars USD
cent cents|degree degrees deg|radian radians rad|mph|kph|unit units|point points|Hz|N|J|W|V|acre acres|euro euros
rupee rupees|sq square|cu cubic|circ
"""
UNITS = {name: group.split()[0] for line in _UNITS.split("\n") for group in line.split("|") for name in group.split()}
UNITS["circ"] = "degree"
# Words that may stand beside a unit, words that may stand in its place, and nouns whose plural has no s.
BESIDE_UNITS = _words(
    "us in sq square cu cubic per an a each of the all more every squared cubed away long tall high old wide deep new"
)
IN_PLACE_OF_UNITS = _words("total left altogether remaining overall each apiece more extra people men women children")
IN_PLACE_OF_UNITS += _words("mice geese fish sheep money person man woman child")
# Words that make another number of the one before them, or offer another answer: never part of a unit.
NEVER_UNITS = _words(
    "or and not but nor either neither maybe perhaps possibly probably alternatively otherwise between to versus vs "
    "than minus plus times over less fewer below above under negative positive even odd yes no true false none "
    "both undefined infinite prime composite respectively equals is are was if unless except instead root factorial "
    "power mod modulo divided choose through until up down base then also again but yet e i pi sin cos tan ln log exp"
)
# Words that could be products of variables, were they not behind a space.
SMALL_WORDS = _words(
    "is as at by in of to it if we he so no on do an be us me my up go or the for and are was all any can has had her "
    "his our out not but you who did its let may now see way use how why too via per yet nor"
)
# What makes an answer a guess, and what begins an explanation of it.
HEDGES = (
    "or xor maybe perhaps possibly probably alternatively otherwise either might could versus vs unless instead nor"
)
HEDGES = frozenset(_words(HEDGES))
EXPLAINING = (
    "because since as so which where when after for that assuming given with this these those thus therefore hence "
    "meaning i.e. in the he she it they we there by see using from rounded"
)
EXPLAINING = frozenset(_words(EXPLAINING))
