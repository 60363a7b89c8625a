"""The miniature's families of problems: seven subjects with MATH's names, three families each, worked in short steps.

A family draws its numbers with `draw(low, high)`, both ends included, from ranges that its level (1 to 5) widens. It returns
a problem and its solution before names and items are filled in; `{name}`, `{item}` and `{other}` are the blanks."""

from collections.abc import Callable
from fractions import Fraction

Family = Callable[[Callable[[int, int], int], int], tuple[str, str]]


def _fraction(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def shopping(draw, level):
    """Change from a purchase of several equal things."""
    count, price = draw(2, 4 + 2 * level), draw(2, 6 + 3 * level)
    paid = count * price + draw(1, 10 * level + 5)
    problem = (
        f"{{name}} buys ${count}$ {{item}} at ${price}$ dollars each and pays with ${paid}$ dollars. How many dollars are left?"
    )
    solution = rf"The {{item}} cost ${count} \cdot {price} = {count * price}$ dollars. So $\boxed{{{paid - count * price}}}$ dollars are left."
    return problem, solution


def mean_of_three(draw, level):
    """Mean of three numbers whose sum is a multiple of three."""
    first, second = draw(2, 10 + 10 * level), draw(2, 10 + 10 * level)
    third = draw(1, 4 + 3 * level) * 3 - (first + second) % 3
    total = first + second + third
    problem = f"What is the mean of ${first}$, ${second}$ and ${third}$?"
    return problem, rf"The sum is ${first + second} + {third} = {total}$. The mean is $\boxed{{{total // 3}}}$."


def percent(draw, level):
    """A multiple of five percent of a multiple of twenty."""
    fives, unit = draw(1, 19), draw(2, 12 + 8 * level)
    problem = f"What is ${5 * fives}$ percent of ${20 * unit}$?"
    return problem, rf"Five percent of ${20 * unit}$ is ${unit}$. So ${fives} \cdot {unit} = \boxed{{{fives * unit}}}$."


def linear_equation(draw, level):
    """ax + b = c for x."""
    a, x, b = draw(2, 4 + level), draw(2, 8 + 4 * level), draw(1, 10 + 8 * level)
    problem = f"Solve ${a}x + {b} = {a * x + b}$ for $x$."
    return problem, rf"So ${a}x = {a * x + b} - {b} = {a * x}$. Then $x = \boxed{{{x}}}$."


def linear_function(draw, level):
    """A linear function at a point."""
    a, b, c = draw(2, 5 + 2 * level), draw(1, 9 + 6 * level), draw(2, 6 + 3 * level)
    problem = f"If $f(x) = {a}x + {b}$, what is $f({c})$?"
    return problem, rf"$f({c}) = {a} \cdot {c} + {b} = {a * c} + {b} = \boxed{{{a * c + b}}}$."


def sum_and_difference(draw, level):
    """The larger of two numbers from their sum and difference."""
    small = draw(2, 14 + 14 * level)
    large = small + draw(1, 14 + 12 * level)
    problem = f"The sum of two numbers is ${small + large}$ and their difference is ${large - small}$. What is the larger number?"
    solution = rf"Twice the larger number is ${small + large} + {large - small} = {2 * large}$. So it is $\boxed{{{large}}}$."
    return problem, solution


def dividend(draw, level):
    """The number from its divisor, quotient and remainder: one product and one sum, as in `linear_function`."""
    divisor, quotient = draw(2, 5 + 2 * level), draw(2, 6 + 3 * level)
    left = draw(1, divisor - 1)
    problem = f"A number divided by ${divisor}$ gives ${quotient}$ and remainder ${left}$. What is the number?"
    product = quotient * divisor
    return problem, rf"${quotient} \cdot {divisor} = {product}$ and ${product} + {left} = \boxed{{{product + left}}}$."


def greatest_common_divisor(draw, level):
    """Euclid's algorithm on two numbers built from a drawn divisor."""
    base = draw(2, 7 + level)
    a, b = base * draw(2, 9 + 2 * level), base * draw(2, 9 + 2 * level)
    a, b = max(a, b), min(a, b)
    steps, high, low = [], a, b
    while low:
        steps.append(f"${high} = {high // low} \\cdot {low} + {high % low}$")
        high, low = low, high % low
    problem = f"What is the greatest common divisor of ${a}$ and ${b}$?"
    return problem, " and ".join(steps) + rf". So it is $\boxed{{{high}}}$."


def base_to_ten(draw, level):
    """A number of two digits in another base: one product and one sum, in another arrangement."""
    base = draw(4, 7 + 2 * level)
    high, low = draw(1, base - 1), draw(1, base - 1)
    problem = f"In base ${base}$ a number has the digits ${high}$ and ${low}$. What is the number in base ten?"
    return problem, rf"${high} \cdot {base} = {high * base}$ and ${high * base} + {low} = \boxed{{{high * base + low}}}$."


def outfits(draw, level):
    """The multiplication principle with three choices."""
    a, b, c = draw(2, 5 + level), draw(2, 6 + level), draw(2, 6 + level)
    problem = f"{{name}} has ${a}$ hats, ${b}$ {{item}} and ${c}$ {{other}}. In how many ways can {{name}} pick one of each?"
    return problem, rf"${a} \cdot {b} = {a * b}$ and ${a * b} \cdot {c} = \boxed{{{a * b * c}}}$."


def pairs(draw, level):
    """Choosing two of one kind and one of another."""
    n, m = draw(3, 10 + 2 * level), draw(2, 15 + 4 * level)
    two = n * (n - 1) // 2
    problem = f"In how many ways can two of ${n}$ {{item}} and one of ${m}$ {{other}} be picked?"
    solution = (
        rf"Two of ${n}$ can be picked in $\frac{{{2 * two}}}{{2}} = {two}$ ways. So ${two} \cdot {m} = \boxed{{{two * m}}}$."
    )
    return problem, solution


def red_probability(draw, level):
    """Probability of a colour, as a reduced fraction."""
    red, blue, green = draw(1, 5 + 2 * level), draw(1, 6 + 2 * level), draw(1, 6 + 2 * level)
    total = red + blue + green
    problem = (
        f"A box holds ${red}$ red, ${blue}$ blue and ${green}$ green {{item}}. What is the probability that one picked is red?"
    )
    solution = rf"There are ${red + blue} + {green} = {total}$. So it is ${red}$ of ${total}$, that is $\boxed{{{_fraction(Fraction(red, total))}}}$."
    return problem, solution


def third_angle(draw, level):
    """The third angle of a triangle."""
    first, second = draw(20, 60 + 5 * level), draw(20, 65 + 5 * level)
    problem = f"Two angles of a triangle are ${first}$ and ${second}$ degrees. How many degrees is the third?"
    return problem, rf"${first} + {second} = {first + second}$ and $180 - {first + second} = \boxed{{{180 - first - second}}}$."


def box_volume(draw, level):
    """Volume of a box."""
    a, b, c = draw(2, 5 + level), draw(2, 7 + level), draw(2, 8 + level)
    problem = f"A box is ${a}$ long, ${b}$ wide and ${c}$ high. What is its volume?"
    return problem, rf"The base is ${a} \cdot {b} = {a * b}$. The volume is ${a * b} \cdot {c} = \boxed{{{a * b * c}}}$."


def rectangle_area(draw, level):
    """Area of a rectangle from its perimeter and width."""
    width, length = draw(2, 10 + 2 * level), draw(2, 14 + 3 * level)
    half = width + length
    problem = f"A rectangle has perimeter ${2 * half}$ and width ${width}$. What is its area?"
    solution = rf"Half of ${2 * half}$ is ${half}$. The length is ${half} - {width} = {length}$. "
    return problem, solution + rf"The area is ${width} \cdot {length} = \boxed{{{width * length}}}$."


def quadratic_value(draw, level):
    """A monic quadratic at a point."""
    b, c, x = draw(1, 4 + 2 * level), draw(1, 8 + 4 * level), draw(2, 5 + level)
    problem = f"If $f(x) = x^2 + {b}x + {c}$, what is $f({x})$?"
    solution = rf"${x}^2 = {x * x}$ and ${b} \cdot {x} = {b * x}$. So ${x * x} + {b * x} + {c} = \boxed{{{x * x + b * x + c}}}$."
    return problem, solution


def composition(draw, level):
    """Two linear functions, one inside the other."""
    a, b, c, d = draw(2, 3 + level), draw(1, 5 + 2 * level), draw(2, 3 + level // 2), draw(1, 4 + level)
    e = draw(2, 4 + level)
    inner = c * e + d
    problem = f"If $f(x) = {a}x + {b}$ and $g(x) = {c}x + {d}$, what is $f(g({e}))$?"
    return problem, rf"$g({e}) = {c * e} + {d} = {inner}$. So $f({inner}) = {a * inner} + {b} = \boxed{{{a * inner + b}}}$."


def squared_roots(draw, level):
    """Sum of the squares of a quadratic's roots, by Vieta."""
    b, c = draw(5, 9 + 2 * level), draw(2, 40 + 4 * level)
    problem = f"What is the sum of the squares of the roots of $x^2 - {b}x + {c}$?"
    return problem, rf"The sum of the roots is ${b}$ and ${b}^2 = {b * b}$. So ${b * b} - {2 * c} = \boxed{{{b * b - 2 * c}}}$."


def dot_product(draw, level):
    """Dot product of two plane vectors."""
    a, b, c, d = draw(2, 6 + level), draw(2, 6 + level), draw(2, 7 + level), draw(2, 8 + level)
    problem = f"What is the dot product of $({a}, {b})$ and $({c}, {d})$?"
    solution = rf"${a} \cdot {c} = {a * c}$ and ${b} \cdot {d} = {b * d}$. So ${a * c} + {b * d} = \boxed{{{a * c + b * d}}}$."
    return problem, solution


def arithmetic_sequence(draw, level):
    """The n-th term of an arithmetic sequence."""
    first, step, n = draw(1, 9 + 6 * level), draw(2, 5 + 2 * level), draw(5, 10 + 2 * level)
    problem = f"A sequence starts with ${first}$ and grows by ${step}$ at each step. What is its term number ${n}$?"
    grown = (n - 1) * step
    return problem, rf"${n - 1} \cdot {step} = {grown}$ and ${grown} + {first} = \boxed{{{grown + first}}}$."


def determinant(draw, level):
    """Determinant of a two by two matrix, given by rows."""
    a, b, c, d = draw(2, 4 + level), draw(2, 4 + level), draw(2, 5 + level), draw(2, 5 + level)
    problem = f"What is the determinant of the matrix with rows $({a}, {b})$ and $({c}, {d})$?"
    solution = rf"${a} \cdot {d} = {a * d}$ and ${b} \cdot {c} = {b * c}$. So ${a * d} - {b * c} = \boxed{{{a * d - b * c}}}$."
    return problem, solution


# a table rather than a decorator, so that whoever reads it is seen to reach every family
FAMILIES: dict[str, list[Family]] = {
    "algebra": [linear_equation, linear_function, sum_and_difference],
    "counting_and_probability": [outfits, pairs, red_probability],
    "geometry": [third_angle, box_volume, rectangle_area],
    "intermediate_algebra": [quadratic_value, composition, squared_roots],
    "number_theory": [greatest_common_divisor, dividend, base_to_ten],
    "prealgebra": [shopping, mean_of_three, percent],
    "precalculus": [dot_product, arithmetic_sequence, determinant],
}
