r"""What counts as the same answer: tables by class, from bug reports and real completions, with their neighbours.

``box`` rows stand for ``\boxed{...}`` and hold for GSM8K and MATH; docs/verifiers.md has the conventions in words.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from espo_lightning.tasks.answers import copies, locate
from espo_lightning.tasks.grammar import read
from espo_lightning.tasks.maths import MATH, verify_math
from espo_lightning.tasks.trees import exact

DATA = Path(__file__).parent / "data"

# fmt: off
# class: (answer in a box, gold answer, 1 or 0)
BOXES = {
    "words that are no unit": [
        ("2 thirds", "2", 0), ("2 thirds", "\\frac23", 1), ("3 quarters", "3", 0), ("1 half", "1", 0),
        ("18 degrees below zero", "18", 0), ("18 below zero", "18", 0), ("2 and a half", "2", 0),
        ("2 and a half", "\\frac52", 1), ("7 less than 9", "7", 0), ("7 squared", "7", 0), ("7 cubed", "7", 0),
        ("7 factorial", "7", 0), ("7 or more", "7", 0), ("7 times", "7", 0), ("7 tenths", "7", 0),
        ("7 over 9", "7", 0), ("7 minus", "7", 0), ("7 point 5", "7", 0), ("7 to 9", "7", 0), ("7 nine", "7", 0),
        ("7\\text{ hundredths}", "7", 0), ("7 more than x", "7", 0), ("not 7", "7", 0),
        ("7 \\text{ is wrong}", "7", 0), ("minus 7", "7", 0),
    ],
    "words that multiply": [
        ("7 \\text{ million}", "7", 0), ("7\\text{ dozen}", "7", 0), ("7\\text{ dozen}", "84", 1),
        ("1 million", "1000000", 1), ("2.5 million", "2500000", 1), ("7 hundred", "7", 0), ("7 hundred", "700", 1),
        ("3 \\text{ billion}", "3", 0), ("2 dozen eggs", "24", 1), ("2 dozen eggs", "2", 0),
        ("5 hundred thousand", "500000", 1), ("1.2 trillion", "1.2", 0), ("7 \\mbox{ thousand}", "7", 0),
        ("7\\mathrm{ million}", "7000000", 1), ("7 million dollars", "7000000", 1),
    ],
    "units and currency": [
        ("25 US dollars", "25", 1), ("US\\$25", "25", 1), ("25¢", "25", 1), ("\\pounds 25", "25", 1),
        ("25 m²", "25", 1), ("25 sq. ft.", "25", 1), ("25 km/hr", "25", 1), ("at least 25", "25", 0),
        ("over 25", "25", 0), ("up to 25", "25", 0), ("more than 25", "25", 0), ("25 \\text{ years old}", "25", 1),
        ("25 m^2", "25", 1), ("25°", "25", 1), ("USD 25", "25", 1), ("approximately 25", "25", 1), ("€10", "10", 1),
        ("25 cm", "25", 1), ("25cm", "25", 1), ("25\\text{ cm}^2", "25", 1), ("25 \\, \\mathrm{km/h}", "25", 1),
        ("£25", "25", 1), ("25 €", "25", 1), ("\\$25", "25", 1), ("25 USD", "25", 1), ("about 25", "25", 1),
        ("\\approx 25", "25", 1), ("25 square units", "25", 1), ("25^\\circ", "25", 1), ("25^{\\circ}", "25", 1),
        ("25^\\circ \\text{C}", "25", 1), ("25 miles per hour", "25", 1), ("25\\text{ apples}", "25", 1),
        ("25 apples left", "25", 1), ("12 red marbles", "12", 1), ("25 people", "25", 1), ("25 cubic feet", "25", 1),
        ("6\\sqrt{2}\\text{ cm}", "6\\sqrt2", 1), ("288\\pi\\text{ cm}^3", "288\\pi", 1),
        ("25 dollars each", "25", 1), ("25", "25\\text{ inches}", 1), ("25\\text{ feet}", "25\\text{ inches}", 0),
        ("25 feet", "25\\text{ ft}", 1), ("25 m^2", "25\\text{ m}^3", 0), ("25 hours", "25\\text{ minutes}", 0),
        ("1/2 hour", "\\frac12", 1), ("5m", "5", 0), ("3x", "3", 0), ("3 xy", "3", 0), ("5 m", "5m", 0),
        ("5i", "5", 0), ("18 pi", "18", 0), ("25\\foo{m}", "25", 0), ("25 \\text{Monday}", "25", 0),
        ("25 even", "25", 0), ("5 cm Monday", "5", 0),
    ],
    "several quantities": [
        ("3\\text{ hours } 40\\text{ minutes}", "3\\text{ hours } 20\\text{ minutes}", 0),
        ("3 h 20 min", "3\\text{ hours } 20\\text{ minutes}", 1), ("3\\text{ hours } 20\\text{ minutes}", "3", 0),
        ("5 feet 7 inches", "5\\text{ feet } 8\\text{ inches}", 0), ("5 feet 7 inches", "7", 0),
        ("5 feet 7 inches", "5", 0), ("2 hours and 30 minutes", "2", 0), ("2 hours and 30 minutes", "30", 0),
        ("7 apples 9 pears", "7", 0),
    ],
    "per cent": [
        ("25 per cent", "\\frac14", 1), ("25 per cent", "25", 1), ("\\frac14 = 25\\%", "\\frac14", 1),
        ("\\frac14 = 20\\%", "\\frac14", 0),
        ("0.25\\%", "\\frac14", 0), ("25\\%", "\\frac14", 1), ("\\frac14", "25\\%", 1), ("25\\%", "25\\%", 1),
        ("25", "25\\%", 1), ("0.25", "25\\%", 1), ("0.25\\%", "25\\%", 0), ("25 percent", "0.25", 1),
        ("25\\%", "25", 1), ("2500\\%", "25", 0), ("0.25\\%", "25", 0), ("12.5\\%", "\\frac18", 1),
        ("12.5\\%", "12.5", 1), ("150\\%", "\\frac32", 1), ("1.5\\%", "\\frac32", 0), ("0.25\\%", "0.25", 0),
        ("50\\% + 10", "60", 0),
    ],
    "exact, however small the difference": [
        ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}", 0), ("\\frac{1}{2^{99}}", "2^{-99}", 1),
        ("10^{-21}", "10^{-20}", 0), ("2-2^{-98}", "2-2^{-99}", 0),
        ("\\frac{1}{3\\cdot 2^{2006}}", "\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", 0),
        ("6.7\\times10^{-5}", ".0000672", 0), ("6.72\\times10^{-5}", ".0000672", 1), ("\\pi+10^{-30}", "\\pi", 0),
        ("\\frac{x}{2^{98}}", "\\frac{x}{2^{99}}", 0), ("x+10^{-20}", "x", 0), ("10^{20}+1", "10^{20}", 0),
        ("\\sqrt{10^{40}+1}", "10^{20}", 0), ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt6}", 1),
        ("y = 2^{-98}x", "y = 2^{-99}x", 0), ("(2^{-98}, 1)", "(2^{-99}, 1)", 0), ("17.999999999", "18", 0),
        ("\\begin{pmatrix}10^{-20}\\end{pmatrix}", "\\begin{pmatrix}0\\end{pmatrix}", 0),
    ],
    "decimals are exact too": [
        ("-\\sqrt3 \\approx -1.73", "-\\sqrt3", 1), ("x < \\sqrt3 \\approx 1.73", "\\sqrt3", 0),
        ("\\sqrt3 \\approx 1.732", "\\sqrt3", 1), ("\\sqrt3 \\approx 1.8", "\\sqrt3", 0),
        ("\\sqrt3 \\approx 1.732", "1.732", 0), ("17 \\approx 17.1", "17", 0), ("17.0 \\approx 17.1", "17", 0),
        ("x = \\sqrt3 \\approx 1.73", "\\sqrt3", 1), ("\\frac13 \\approx 0.333", "\\frac13", 1),
        ("0.333333", "\\frac13", 0), ("1.7320508", "\\sqrt3", 0), ("3.14", "\\pi", 0),
        ("3.14159265358979", "\\pi", 0), ("\\sqrt3", "1.73", 0), ("0.50", "\\frac12", 1), (".5", "\\frac12", 1),
        ("0.\\overline{3}", "\\frac13", 1), ("0.1\\overline{6}", "\\frac16", 1),
        ("0.\\overline{36}", "\\frac{4}{11}", 1), ("0.\\bar{3}", "\\frac13", 1), ("0.3...", "\\frac13", 0),
        ("2.718", "e", 0), ("\\frac{3.0}{6}", "\\frac12", 1), ("1.414", "\\sqrt2", 0),
    ],
    "never a fragment": [
        ("1, 3, 5, \\ldots, 2n-1", "1, 2, \\ldots, n", 0), ("1, 2, \\ldots, n", "1, 2, \\ldots, n", 1),
        ("\\frac13 \\foo{2}", "\\frac13", 0), ("\\foo \\frac13", "\\frac13", 0), ("7 )", "7", 0), ("7 + ", "7", 0),
        ("= 7", "7", 0), ("7 =", "7", 0), ("7,", "7", 0), ("\\frac{7}{", "7", 0), ("7 \\pmod 9", "7", 0),
        ("x \\equiv 7", "7", 0), ("7 \\mapsto 9", "7", 0), ("7\\text{1}", "7", 0), ("7 \\quad 9", "7", 0),
        ("7\\\\9", "9", 0), ("7 & 9", "7", 0), ("\\frac13 ?", "\\frac13", 0), ("7_9", "7", 0),
    ],
    "one box, one value": [
        ("7\\text{1}", "71", 0), ("7\\mbox{1}", "7", 0), ("7\\mbox{1}", "71", 0), ("7\\mathrm{1}", "71", 0),
        ("\\text{7}1", "71", 0), ("7\\,1", "71", 0), ("7\\!1", "71", 0), ("7{1}", "71", 0), ("7~1", "71", 0),
        ("7 1", "71", 0), ("7\\textbf{1}", "7", 0), ("\\text{71}", "71", 1), ("\\mathbf{71}", "71", 1),
        ("7\\text{x}", "7x", 1), ("7\\text{x}", "7", 0),
    ],
    "bases": [
        ("52_7", "52_8", 0), ("52_8", "52_8", 1), ("52_{8}", "52_8", 1), ("53_8", "52_8", 0), ("42", "52_8", 0),
        ("52", "52_8", 1), ("52_8", "52", 0), ("1011_2", "11", 0),
    ],
    "relations are no values": [
        ("\\sim 7", "7", 0), ("\\neg 7", "7", 0), ("7 \\oplus 9", "7", 0),
        ("\\ge 7", "7", 0), ("\\neq 7", "7", 0), ("5 | 7", "7", 0), ("x=5=7", "7", 0), ("\\le 7", "7", 0),
        ("> 7", "7", 0), ("x > 7", "7", 0), ("x \\ne 7", "7", 0), ("7 < 9", "9", 0), ("7 = 9", "7", 0),
        ("7 = 9", "9", 0), ("9 \\ne 7", "7", 0), ("x = 7", "7", 1), ("x = 3 + 4 = 7", "7", 1), ("3 + 4 = 7", "7", 1),
        ("3 + 5 = 7", "7", 0), ("x = 7", "y = 7", 0), ("a + b = 7", "7", 1), ("f(x) = x^2", "x^2", 1),
        ("2x = 14", "14", 0), ("2x = 14", "x = 7", 0), ("x+1 = 7", "7", 0), ("x = y", "y", 0), ("7", "x = 7", 1),
        ("\\angle ABC = 7^\\circ", "7", 1), ("AB = 7", "7", 1), ("\\frac{a}{b} = 7", "7", 1), ("x \\to 7", "7", 0),
        ("x \\approx 7", "7", 0), ("7 \\pm 1", "7", 0), ("x = x + 1", "x+1", 0),
    ],
    "equations and curves": [
        ("2x + y = 0", "y = -2x", 1), ("y = 2x", "y = -2x", 0), ("-2x", "y = -2x", 1),
        ("x^2 + y^2 = 4", "y^2 + x^2 - 4 = 0", 1), ("x^2 + y^2 = 5", "x^2 + y^2 = 4", 0),
        ("(x-2)^2+(y+3)^2=16", "(x-2)^2 + (y+3)^2 = 4^2", 1), ("4", "x^2+y^2 = 4", 0),
        ("x = 3, y = 4", "x = 3, y = 4", 1), ("x = 4, y = 3", "x = 3, y = 4", 0),
    ],
    "names of points keep their order": [
        ("\\angle ACB", "\\angle ABC", 0), ("\\angle ABC", "\\angle ABC", 1), ("BA", "AB", 0),
        ("\\triangle ACB", "\\triangle ABC", 0), ("ABDC", "ABCD", 0), ("ba", "ab", 1), ("A", "a", 0), ("X", "x", 0),
    ],
    "commas": [
        ("32, 349", "32349", 0), ("2500", "2, 500", 0), ("2,500", "2500", 1), ("32,349", "32349", 1),
        ("1,00,000", "100000", 1), ("12,34,567", "1234567", 1), ("10,\\!080", "10080", 1), ("1{,}200", "1200", 1),
        ("10\\,080", "10080", 1), ("1,2", "12", 0), ("(1,200)", "1200", 0), ("(1,200)", "(1, 200)", 1),
        ("1,23", "123", 0), ("1,000,00", "100000", 0), ("\\{1,200\\}", "1200", 0), ("1,000.50", "1000.5", 1),
        ("3,14", "3.14", 0), ("5, 3, 7", "3, 5, 7", 1), ("3, 5", "3, 5, 7", 0), ("3, 5, 5", "3, 5, 7", 0),
        ("3 and 5", "3, 5", 1), ("3; 5", "3, 5", 1), ("x = 3 \\text{ or } x = 5", "3, 5", 1), ("3, 3", "3", 0),
    ],
    "mixed numbers": [
        ("11 5/6", "\\frac{71}{6}", 1), ("1 1/4", "\\frac54", 1), ("1\\frac{4}{5}", "\\frac95", 1),
        ("1½", "\\frac32", 1), ("-1\\frac12", "-\\frac32", 1), ("-1\\frac12", "-\\frac12", 0),
        ("1 5/4", "\\frac94", 0), ("1 1/4", "\\frac14", 0), ("1 1/4", "1", 0), ("11 5/6", "\\frac{115}{6}", 0),
        ("1\\frac{4}{5}", "\\frac45", 0), ("1 \\frac{4}{5} \\text{ cups}", "1.8", 1),
        ("2\\frac{5}{3}", "\\frac{10}{3}", 0),
    ],
    "typed on a keyboard": [
        ("atan(1)", "\\frac{\\pi}{4}", 1), ("asin(1/2)", "\\frac{\\pi}{6}", 1), ("sqrt{3}", "\\sqrt3", 1),
        ("pi/2", "\\frac{\\pi}{2}", 1), ("3pi", "3\\pi", 1), ("-1 + exp(16)", "e^{16}-1", 1),
        ("sqrt(3)/2", "\\frac{\\sqrt3}{2}", 1), ("2*sqrt(3)", "2\\sqrt3", 1), ("x**2+1", "x^2+1", 1),
        ("(x+1)^2", "x^2+2x+1", 1), ("2^10", "1024", 1), ("x^(1/2)", "\\sqrt{x}", 1), ("x >= 3", "x \\ge 3", 1),
        ("(3, infinity)", "(3,\\infty)", 1), ("(3, inf)", "(3,\\infty)", 1), ("theta", "\\theta", 1),
        ("sin(x)", "\\sin x", 1), ("ln(2)", "\\ln 2", 1), ("log_2(8)", "3", 1), ("3*pi", "3", 0),
        ("abs(x)", "|x|", 1), ("cos(pi/3)", "\\frac12", 1), ("1e1", "10", 0), ("sqrt3", "\\sqrt3", 1),
        ("+/- 3", "\\pm 3", 1), ("pi", "3.14", 0),
    ],
    "Unicode": [
        ("2√3", "2\\sqrt3", 1), ("√(x+1)", "\\sqrt{x+1}", 1), ("(−∞, 2)", "(-\\infty,2)", 1), ("3π", "3\\pi", 1),
        ("x²+1", "x^2+1", 1), ("½", "\\frac12", 1), ("3 × 4", "12", 1), ("12 ÷ 4", "3", 1), ("x ≤ 3", "x \\le 3", 1),
        ("±3", "\\pm3", 1), ("30°", "30^\\circ", 1), ("−5", "-5", 1), ("∅", "\\emptyset", 1),
        ("(−∞, 2) ∪ (3, ∞)", "(-\\infty,2)\\cup(3,\\infty)", 1), ("∛2", "\\sqrt[3]{2}", 1), ("２５", "25", 1),
        ("x₁", "x_1", 1), ("2⁻³", "\\frac18", 1), ("α+β", "\\alpha+\\beta", 1), ("²", "2", 0), ("٤٢", "42", 0),
        ("7 ∨ 9", "7", 0),
    ],
    "intervals, inequalities and membership": [
        ("x \\ge -2 \\text{ and } x \\le 7", "x \\in (-\\infty,\\infty)", 0),
        ("-2 \\le x \\le 7", "x \\in [-2,7]", 1), ("[-2,7]", "x \\in [-2,7]", 1), ("x \\in [-2,7]", "[-2,7]", 1),
        ("[-2,7]", "-2 \\le x \\le 7", 1), ("-2 < x \\le 7", "x \\in [-2,7]", 0),
        ("-2 \\le y \\le 7", "x \\in [-2,7]", 0), ("7 \\ge x \\ge -2", "x \\in [-2,7]", 1), ("x>3", "(3,\\infty)", 0),
        ("(3,\\infty)", "x > 3", 1), ("3 < x", "x > 3", 1), ("x \\ge 3", "x > 3", 0), ("x < 3", "x > 3", 0),
        ("[3,\\infty)", "(3,\\infty)", 0), ("x < 2 \\text{ or } x > 5", "x \\in (-\\infty,2) \\cup (5,\\infty)", 1),
        ("(3,5)", "[3,5]", 0), ("(5,\\infty) \\cup (-\\infty,2)", "(-\\infty,2) \\cup (5,\\infty)", 1),
        ("(-\\infty,2)", "(-\\infty,2) \\cup (5,\\infty)", 0), ("y > 2x", "y > 2x", 1), ("2x < y", "y > 2x", 1),
        ("y < 2x", "y > 2x", 0), ("3", "x \\le 3", 0), ("-2 \\le x \\ge 7", "x \\in [-2,7]", 0),
    ],
    "sets, tuples, lists": [
        ("\\{3,4\\}", "(3,4)", 0), ("(3,4)", "\\{3,4\\}", 0), ("[3,4]", "\\{3,4\\}", 0), ("\\{3,4\\}", "[3,4]", 0),
        ("[3,4]", "(3,4)", 0), ("\\{4,3\\}", "\\{3,4\\}", 1), ("(4,3)", "(3,4)", 0), ("3,4", "\\{3,4\\}", 1),
        ("\\{3,4\\}", "3,4", 1), ("3,4", "(3,4)", 0), ("(3,4)", "3,4", 0), ("\\langle 3,4 \\rangle", "(3,4)", 0),
        ("\\begin{pmatrix}3\\\\4\\end{pmatrix}", "(3,4)", 0), ("(3,4,5)", "(3,4)", 0), ("(3)", "3", 1),
        ("\\{3,4,5\\}", "\\{3,4\\}", 0),
        ("\\begin{bmatrix}3\\\\4\\end{bmatrix}", "\\begin{pmatrix}3\\\\4\\end{pmatrix}", 1),
        ("\\begin{pmatrix}3&4\\end{pmatrix}", "\\begin{pmatrix}3\\\\4\\end{pmatrix}", 0),
        ("(3,30^\\circ)", "(3, 30^{\\circ})", 1), ("(\\frac12, 0.5)", "(0.5, \\frac12)", 1),
        ("\\{\\}", "\\emptyset", 1), ("0", "\\emptyset", 0),
    ],
    "joined guesses": [
        ("7 \\vee 9", "7", 0), ("7 \\cup 9", "7", 0), ("7 \\vee 9", "9", 0), ("7 \\cup 9", "9", 0),
        ("7 \\lor 9", "7", 0), ("7 \\land 9", "9", 0), ("7 or 9", "7", 0), ("7 or 9", "9", 0), ("7, 9", "9", 0),
        ("7; 9", "7", 0), ("7 \\text{ or } 9", "7", 0), ("7 (9)", "7", 0), ("7 \\text{ (or } 9)", "7", 0),
        ("7 [9]", "9", 0), ("7: 9", "7", 0), ("7 \\to 9", "9", 0), ("7 \\mid 9", "9", 0), ("7 \\equiv 9", "7", 0),
        ("1 A", "A", 0), ("0 x", "0", 0), ("1 (42)", "42", 0), ("\\text{even or odd}", "\\text{even}", 0),
        ("\\text{even/odd}", "\\text{odd}", 0), ("maybe 7", "7", 0), ("7?", "7", 0), ("0.5 or 1/2", "\\frac12", 1),
        ("7 or 7", "7", 1), ("7 or 9", "7, 9", 1), ("17 xor 18", "17", 0),
    ],
    "ratios": [
        ("3:2", "3:2", 1), ("6:4", "3:2", 1), ("2:3", "3:2", 0), ("3:2", "\\frac32", 0), ("9:1", "9", 0),
        ("1:2:3", "2:4:6", 1),
    ],
    "words": [
        ("even", "\\text{even}", 1), ("\\text{Even}", "\\text{even}", 1), ("\\text{odd}", "\\text{even}", 0),
        ("odd", "\\text{odd}", 1), ("dod", "\\text{odd}", 0), ("(C)", "\\text{(C)}", 1), ("C", "\\text{(C)}", 1),
        ("\\text{(B)}", "\\text{(C)}", 0), ("June 20", "\\text{June 20}", 1), ("June 21", "\\text{June 20}", 0),
        ("\\textbf{yes}", "\\text{Yes}", 1), ("not even", "\\text{even}", 0),
    ],
    "what models write all day": [
        ("\\sqrt{3}/2", "\\frac{\\sqrt3}{2}", 1), ("-1/2", "-\\frac12", 1), ("\\frac{-1}{2}", "-\\frac12", 1),
        ("\\tfrac12", "0.5", 1), ("\\left(\\frac12\\right)^3", "\\frac18", 1), ("\\$32{,}348", "32348", 1),
        ("\\$ 12.50", "12.5", 1), ("\\pm 3", "3, -3", 1), ("-3, 3", "\\pm 3", 1),
        ("\\log_{2}{3}", "\\frac{\\ln 3}{\\ln 2}", 1), ("\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt2}", 1),
        ("n(n+1)/2", "\\frac{n(n+1)}{2}", 1), ("|x-3|", "|3-x|", 1), ("6!", "720", 1), ("\\binom{10}{3}", "120", 1),
        ("1.5\\times 10^{3}", "1500", 1), ("10\\text{ m/s}", "10", 1), ("\\mathrm{e}^{2}", "e^2", 1),
        ("1-12i", "1 - 12i", 1), ("e^{i\\pi}", "-1", 1), ("\\sin 30^\\circ", "\\frac12", 1),
        ("\\cos 20", "\\cos 20^\\circ", 0), ("\\sin^{-1} 1", "\\frac{\\pi}{2}", 1), ("\\sin^2 x + \\cos^2 x", "1", 1),
        ("ab+bc+ca", "ac+ab+bc", 1), ("15x - 80", "5(3x-16)", 1), ("a_n = 2n+1", "2n+1", 1),
        ("\\lfloor 2.5 \\rfloor", "2", 1), ("2^{2005}", "2^{2004}", 0), ("\\displaystyle\\frac{1}{2}", "\\frac12", 1),
        ("\\frac1x", "x^{-1}", 1), ("x^{12}", "x^1 2", 0), ("\\boxed{7}", "7", 1), ("{7}", "7", 1),
        ("\\left\\{1,2\\right\\}", "\\{1,2\\}", 1),
    ],
}

# class: (completion, gold answer, 1 or 0)
TEXTS = {
    "below or behind the marker": [
        ("**Answer:**\n\n540 meters", "540", 1), ("*Answer:*\n540", "540", 1), ("**Answer**: 540", "540", 1),
        ("Answer:\n540", "540", 1), ("__Answer:__ 540", "540", 1), ("## Answer\n\n540", "540", 1),
        ("**Final Answer**\n\n$540$", "540", 1), ("**Answer:** **540**", "540", 1),
        ("The answer is:\n\n\\[\n540\n\\]", "540", 1), ("The answer is\n$$540$$", "540", 1),
        ("Answer = 540", "540", 1), ("answer: `540`", "540", 1), ("The answers are 3 and 5.", "3, 5", 1),
        ("The answer to the question is 540.", "540", 1), ("**The answer is 540.**", "540", 1),
        ("**Answer:**\n\n\n\n", "540", 0), ("Answer:\n\nit is unclear", "540", 0),
        ("Answer: 540\n\nExplanation: 12 + 3.", "540", 1),
    ],
    "equations behind the marker": [
        ("Answer: 12 apples + 25 apples = 37 apples", "37", 1),
        ("Answer: 12 apples + 25 apples = 37 apples", "12", 0),
        ("Answer: 12 apples + 25 apples = 37 apples", "25", 0), ("The answer is $5 + $3 = $8.", "8", 1),
        ("The answer is $5 + $3 = $8.", "5", 0), ("The answer is 12 + 25.", "12", 0),
        ("The answer is 12 + 25 = 38.", "38", 0), ("The answer is 3 * 6 = 18.", "18", 1),
        ("The answer is x = 18.", "18", 1), ("#### 12 - 4 = 8", "12", 0),
    ],
    "hedges": [
        ("The answer is 17 or 18.", "17", 0), ("The answer is 17 or 18.", "18", 0),
        ("The answer is 17, or 18.", "17", 0), ("#### 17 or 18", "17", 0), ("The answer is 17 (or 18).", "17", 0),
        ("The answer is 17, maybe 18.", "17", 0), ("The answer is 17. Or 18.", "17", 0),
        ("The answer is 17; 18.", "17", 0), ("The answer is either 17 or 18.", "17", 0),
        ("The answer is 17, possibly more.", "17", 0), ("The answer is 17. 18.", "17", 0),
        ("The answer is 17\n18", "17", 0), ("The answer is 17 and 18.", "18", 0), ("The answer is 17/18.", "17", 0),
        ("The answer is 17 - 18.", "18", 0), ("The answer is 17 to 18.", "17", 0),
        ("The answer is 17 [18].", "17", 0), ("The answer is 17 vs 18.", "17", 0),
        ("\\boxed{17} or \\boxed{18}", "18", 0), ("\\boxed{17} or \\boxed{18}", "17", 0),
        ("\\boxed{17}\\boxed{18}", "18", 0), ("\\boxed{17} / \\boxed{18}", "18", 0),
        ("\\boxed{17}, or maybe \\boxed{18}", "18", 0), ("\\boxed{17} or 18", "17", 0),
        ("\\boxed{17}, perhaps 18", "17", 0), ("$\\boxed{17}$, $18$", "17", 0), ("\\boxed{17}, \\boxed{18}", "18", 0),
        ("\\boxed{17} \\vee 18", "17", 0), ("<answer>17 or 18</answer>", "17", 0),
        ("<answer>17\n18</answer>", "18", 0), ("\\boxed{17}{18}", "17", 0), ("It is 17 or 18", "18", 0),
        ("The answer is 10! or 9", "9", 0), ("\\boxed{\\frac12}, or $0.5$", "\\frac12", 1),
    ],
    "words that change the number": [
        ("The answer is 18 million.", "18", 0), ("The answer is 18 million.", "18000000", 1),
        ("The answer is 2 and a half.", "2", 0), ("The answer is 2 hours and 30 minutes.", "2", 0),
        ("The answer is 2 thirds.", "2", 0), ("The answer is 3 dozen.", "36", 1), ("#### 18 thousand", "18", 0),
        ("The answer is 7 less than 9.", "7", 0), ("The answer is not 18.", "18", 0),
        ("The answer is 18 squared.", "18", 0), ("The answer is 18 degrees below zero.", "18", 0),
        ("The answer is minus 18.", "18", 0), ("The answer is 2 times 9.", "2", 0), ("The answer is 1 in 5.", "1", 0),
        ("The answer is 18 hundredths.", "18", 0),
    ],
    "remarks behind the answer": [
        ("The answer is 5 cookies per friend, with 2 left over.", "5", 1), ("The answer is therefore 17.", "17", 1),
        ("The answer is thus 17 or 18.", "17", 0), ("The answer is simply $17$.", "17", 1),
        ("So $\\boxed{17}$. 24 hours are a day.", "17", 1), ("The answer is 17. 3 of them are red.", "17", 1),
        ("#### 17 -- done", "17", 1), ("#### 17 ✅", "17", 1), ("#### 17, as required", "17", 1),
        ("The answer is 17 ✓.", "17", 1),
        ("#### 17 (see above)", "17", 1), ("The answer is 17, because 3 are left.", "17", 1),
        ("The answer is 17 (rounded down).", "17", 1), ("The answer is 17. I checked it with 3 examples.", "17", 1),
        ("The answer is 17 apples that she bought.", "17", 1), ("The answer is 17 as shown above.", "17", 1),
        ("The answer is 17, which is what we wanted.", "17", 1), ("#### 17\n\nThat is all.", "17", 1),
        ("The answer is $17$ by symmetry.", "17", 1), ("#### 17 (18)", "17", 0),
        ("The answer is 17 (x = 18).", "17", 0), ("#### 17 (nine)", "17", 0), ("\\boxed{17}. That is all.", "17", 1),
    ],
    "currency and delimiters": [
        ("The answer is $\\$25$.", "25", 1), ("The answer is €10", "10", 1), ("The answer is €10.", "10", 1),
        ("The answer is $25.", "25", 1), ("The answer is \\(25\\).", "25", 1), ("The answer is \\$25.50.", "25.5", 1),
        ("The answer is £1,200.", "1200", 1), ("The answer is 25$.", "25", 1),
        ("The answer is $\\text{\\$}25$.", "25", 1), ("The answer is $1$ $2$.", "12", 0),
        ("The answer is $1$$2$.", "12", 0),
    ],
    "several boxes and boxes without braces": [
        ("\\boxed{3}, \\boxed{5}, \\boxed{7}", "3,5,7", 1), ("\\boxed{3}, \\boxed{5} and \\boxed{7}", "3,5,7", 1),
        ("$\\boxed{3}$ and $\\boxed{5}$", "3,5", 1), ("\\boxed{3}, \\boxed{5}, \\boxed{7}", "7", 0),
        ("$\\boxed5$", "5", 1), ("$\\boxed 2$", "2", 1), ("$\\boxed x$", "x", 1), ("\\boxed 23", "2", 0),
        ("\\boxed 23", "3", 0), ("\\boxed{5} so again \\boxed{5}", "5", 1),
        ("\\boxed{7} ... wait, \\boxed{18}", "18", 1), ("\\boxed{5}. Check: \\boxed{5}", "5", 1),
        ("\\fbox{5}", "5", 1), ("\\boxed{5}\\%", "5", 1), ("\\boxed{5} cm", "5", 1),
        ("\\boxed{5}$ for all $i \\ge 5$", "5", 1),
    ],
    "tags": [
        ("<answer>\n\\frac{1}{4}\n</answer>", "\\frac14", 1), ("<answer>7</answer>", "7", 1),
        ("<answer>The answer is 7.</answer>", "7", 1), ("<answer>\\boxed{7}</answer>", "7", 1),
        ("\\boxed{9} <answer>7</answer>", "7", 1), ("\\boxed{9} <answer>7</answer>", "9", 0),
        ("<ANSWER>7</ANSWER>", "7", 1), ("<answer>9</answer> no: <answer>7</answer>", "7", 1),
        ("<answer></answer>", "7", 0), ("<answer>7", "8", 0),
        ("<answer>so we get 7 apples and then</answer>", "7", 0),
    ],
    "boxes that never close": [
        ("\\boxed{120\n</answer}", "120", 0), ("\\boxed{12", "12", 0), ("<answer>\\boxed{12</answer>", "12", 0),
    ],
}
# fmt: on


def rows(table: dict) -> list:
    return [pytest.param(*row, id=f"{kind}: {row[0]!r} for {row[1]}") for kind, found in table.items() for row in found]


@pytest.mark.parametrize(("answer", "gold", "right"), rows(BOXES))
def test_boxes(answer, gold, right):
    verdicts = [verify_math(f"So it is $\\boxed{{{answer}}}$.", gold, numbers) for numbers in (True, False)]
    assert [verdict["reward"] for verdict in verdicts] == [right, right]
    assert all(verdict["failed"] == 0.0 for verdict in verdicts)


@pytest.mark.parametrize(("text", "gold", "right"), rows(TEXTS))
def test_texts(text, gold, right):
    verdicts = [verify_math(text, gold, numbers) for numbers in (True, False)]
    numbers_only = not ("boxed" in text or "nswer" in text or "#" in text or "fbox" in text or "NSWER" in text)
    assert verdicts[0]["reward"] == right
    assert verdicts[1]["reward"] == (0 if numbers_only else right)


# ---- no text is right for two different answers -------------------------------------------------------------------

# fmt: off
GOLDS = (
    "7", "9", "12", "42", "-3", "3.5", "0.25", "1000", "x", "y", "2x+1", "x^2", "\\pi", "2\\pi", "\\sqrt{3}",
    "\\frac{1}{3}", "\\frac{3}{4}", "(3,4)", "(1,2)", "[2,5]", "(3,\\infty)", "\\{1,2\\}", "\\{3,4\\}", "1,2",
    "3,5,7", "\\text{even}", "\\text{odd}", "\\text{Monday}", "30^\\circ", "37\\%", "52_8", "y=-2x", "x=5",
    "x\\in[-2,7]", "1+2i", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "8\\text{cm}", "\\emptyset", "AB", "1:2", "x\\le3",
    "\\text{(C)}", "A", "1\\frac{1}{2}", "\\binom{5}{2}",
)
JOINERS = (
    " or ", ", or ", ", ", ",", " and ", "; ", ":", " | ", " \\vee ", " \\lor ", " \\cup ", " \\ne ", " \\approx ",
    "\n", " \\equiv ", " \\to ", " \\text{ or } ", " \\text{ and } ", " \\quad ", "\\ ", "\\,", " maybe ",
    " perhaps ", "~", "\n\n", " instead of ", " not ", " but ", " versus ", " vs. ", " to ", "\\text{ maybe }",
    "\\text{ if not }", " & ", "? ", ". ", " \\\\ ", " \\le ", " < ", "\\%", "' ", " \\mid ", "\\;", "...",
    " \\ldots ", " \\land ", " xor ", " then ", "", " ", " alternatively ", "\\text{ units } ", "}{", "$ or $",
    "$, $", "} or \\boxed{", "} \\boxed{", "}, \\boxed{", "}\\boxed{", "} maybe \\boxed{", " (or ", " (", " [",
    "\\text{", "\\mbox{", " \\text{(or }", " possibly ", " / maybe ", ", else ",
)
# fmt: on
CLOSING = {"\\text{": "}", "\\mbox{": "}", " (": ")", " (or ": ")", " [": "]", " \\text{(or }": "\\text{)}"}
FORMS = (
    "\\boxed{%s}",
    "The answer is %s.",
    "#### %s",
    "Answer: $%s$",
    "<answer>%s</answer>",
    "**Answer:** %s",
)


def test_no_text_is_right_for_one_of_two_joined_guesses():
    """3,000 pairs of different guesses over 66 joiners: none earns anything, for either gold answer."""
    draw, paid, judged = random.Random(0), [], 0
    while judged < 3000:
        guesses, joiner = draw.sample(GOLDS, 2), draw.choice(JOINERS)
        body = guesses[0] + joiner + guesses[1] + CLOSING.get(joiner, "")
        if body in GOLDS or exact(read(body) or ("words",)) is not None:  # 7 and 9 side by side are 79
            continue
        text, numbers = draw.choice(FORMS).replace("%s", body), draw.random() < 0.5
        judged += 1
        paid += [(text, gold, numbers) for gold in guesses if verify_math(text, gold, numbers)["reward"]]
    assert paid == []


def test_an_answer_is_right_for_one_gold_only():
    """Every gold answer as a completion, for every other. (A set and a list of the same values are one answer.)"""
    same = [{"\\{1,2\\}", "1,2"}, {"7", "x=7"}, {"(1,2)", "x\\in(1,2)"}]
    for gold in GOLDS:
        right = {other for other in GOLDS if verify_math(f"\\boxed{{{gold}}}", other)["reward"]}
        assert right == {gold} or right in same, gold


def test_equal_verdicts_from_any_thread():
    table = [row for found in BOXES.values() for row in found][::7]
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda row: verify_math(f"\\boxed{{{row[0]}}}", row[1])["reward"], table))
    assert verdicts == [row[2] for row in table]


# ---- copies -------------------------------------------------------------------------------------------------------

QUESTION = "What is $54 \\times 46$? "
QUESTION += "If $f(x) = \\frac{x^2-1}{x-1}$ and $a = \\sqrt{49} - 2^{3}$, note that $\\frac{1}{2} > 0.3$."


@pytest.mark.parametrize(
    ("answer", "gold", "copied"),
    [
        ("54 \\times 46", "2484", 1), ("54 \\cdot 46", "2484", 1), ("54*46", "2484", 1),
        ("(54 \\times 46)", "2484", 1), ("x = 54 \\times 46", "2484", 1), ("54\\times46", "2484", 1),
        ("\\sqrt{49} - 2^{3}", "-1", 1), ("2^{3}", "8", 1), ("\\dfrac{x^2-1}{x-1}", "x+1", 1), ("54 × 46", "2484", 1),
        ("2484", "2484", 0), ("54 \\times 46 = 2484", "2484", 0), ("4 \\times 46", "184", 0),
        ("\\frac{1}{2}", "0.5", 0), ("0.3", "\\frac{3}{10}", 0), ("x", "x", 0), ("54 \\times 46", "54 \\times 46", 0),
        ("1/2", "0.5", 0), ("46 \\times 54", "2484", 0), ("\\foo 54 \\times 46", "2484", 0), ("", "1", 0),
    ],
)  # fmt: skip
def test_copies_of_the_question(answer, gold, copied):
    text = f"\\boxed{{{answer}}}"
    assert copies(answer, QUESTION, gold) == bool(copied)
    plain, strict = (verify_math(text, gold, question=QUESTION, copied=worth) for worth in (1.0, 0.0))
    assert plain["copied"] == strict["copied"] == copied
    assert plain["exact"] == strict["exact"] == plain["reward"]
    assert strict["reward"] == (0.0 if copied else plain["reward"])


def test_always_copying_earns_nothing():
    """The last formula of every problem of the MATH fixture, as a policy that reads nothing would answer."""
    task = MATH(path=str(DATA / "math500_84.jsonl"), held_out=1.0, copied=0.0)
    paid, paid_before = [], []
    for row in task.rows("test"):
        formulas = re.findall(r"\$([^$]+)\$", row["problem"])
        if not formulas:
            continue
        gold = row.get("answer")
        text = f"\\boxed{{{formulas[-1].strip(' .,?')}}}"
        paid += [text] if verify_math(text, gold, question=row["problem"], copied=0.0)["reward"] else []
        paid_before += [text] if verify_math(text, gold)["reward"] else []
    assert len(paid_before) == 7
    assert paid == ["\\boxed{\\frac{3}{20}}"]  # for 0.15: a value, with nothing left to work out


def test_where_the_answer_stands():
    assert locate("so \\boxed{7}", False) == "7"
    assert locate("so it is 7", False) is None
    assert locate("so it is 7", True) == "7"
    assert locate("\\boxed{7} or \\boxed{8}", False) == "7, 8"
