"""A small shop: find what is wanted by searching, look at it closely, and buy it.

    search red shirt      a page of what is both red and a shirt
    next                  the next page
    open 2                what is second on this page; only here its size is written
    back                  to the page again
    buy                   what is open; the episode is over

A wish is drawn from the catalogue, so something in it satisfies every one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megarlx.data.draw import Draw, Split
from megarlx.rollouts.environments import interface
from megarlx.study.environments.splits import drawn_of_split

KINDS = ("shirt", "coat", "hat", "bag", "cup", "lamp")
COLOURS = ("red", "blue", "green", "black", "white", "brown")
MATERIALS = ("wool", "cotton", "paper", "glass")
SIZES = ("small", "medium", "large")
HIGHEST_PRICE = 40
VERBS = ("search", "next", "open", "back", "buy")
OTHER = ("find", "below", "nothing", "more", "end", "bought", "price", "size", "/", "error")


@dataclass(frozen=True)
class Product:
    colour: str
    material: str
    kind: str
    size: str
    price: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.material} {self.kind}"


class Shop:
    def __init__(
        self, products: int = 200, page: int = 3, partial: float = 0.0, seed: int = 0
    ) -> None:
        """`partial` is the most that a bought thing brings which misses a part of the wish."""
        if products < 1 or not 1 <= page <= HIGHEST_PRICE:
            raise ValueError(
                f"shop: products is {products}, page {page}; allowed are at least 1, and 1 to "
                f"{HIGHEST_PRICE}"
            )
        self.products, self.page, self.partial, self.seed = products, page, partial, seed

    @cached_property
    def catalogue(self) -> list[Product]:
        draw = Draw(self.seed, "shop")
        return [
            Product(
                draw.one(COLOURS),
                draw.one(MATERIALS),
                draw.one(KINDS),
                draw.one(SIZES),
                draw.between(5, HIGHEST_PRICE - 1),
            )
            for _ in range(self.products)
        ]

    @property
    def words(self) -> list[str]:
        numbers = [str(n) for n in range(1, HIGHEST_PRICE + 1)]
        return [*KINDS, *COLOURS, *MATERIALS, *SIZES, *numbers, *VERBS, *OTHER]

    def task(self, split: Split, index: int) -> interface.Task:
        draw = Draw(self.seed, "wish", split, index)
        return drawn_of_split(draw, split, self._wish, self._text)

    def _wish(self, draw: Draw) -> interface.Task:
        product = draw.one(self.catalogue)
        below = min(product.price + draw.between(1, 10), HIGHEST_PRICE)
        return {
            "colour": product.colour,
            "kind": product.kind,
            "size": product.size,
            "below": below,
        }

    @staticmethod
    def _text(wish: interface.Task) -> str:
        return "find {colour} {kind} size {size} price below {below}".format(**wish)

    def reset(self, task: interface.Task, seed: int) -> str:
        self.wish, self.found, self.first = task, list[Product](), 0
        self.open: Product | None = None
        self.searched = ""
        self.seen: set[int] = set()  # places of the search that were opened
        return self._text(task)

    def step(self, action: str) -> interface.Step:
        match action.split():
            case ["search", *wanted] if wanted and set(wanted) <= {*KINDS, *COLOURS, *MATERIALS}:
                self.found = [p for p in self.catalogue if set(wanted) <= set(p.name.split())]
                self.searched, self.first, self.open = " ".join(wanted), 0, None
                self.seen = set()
                return self._shown()
            case ["next"] if self.open is None and self.first + self.page < len(self.found):
                self.first += self.page
                return self._shown()
            case ["open", number] if self.open is None and self._on_page(number):
                self.seen.add(self.first + int(number) - 1)
                self.open = self.found[self.first + int(number) - 1]
                text = f"{self.open.name} size {self.open.size} price {self.open.price}"
                return text, 0.0, False, {"valid": True}
            case ["back"] if self.open is not None:
                self.open = None
                return self._shown()
            case ["buy"] if self.open is not None:
                met = self._met(self.open)
                success = met == 1.0
                reward = 1.0 if success else self.partial * met
                return "bought", reward, True, {"success": success, "valid": True}
        return "error", 0.0, False, {"valid": False}

    def solution(self) -> str | None:
        if self.open is not None:
            return "buy" if self._met(self.open) == 1.0 else "back"
        wanted = f"{self.wish['colour']} {self.wish['kind']}"
        ahead = [
            at
            for at, product in enumerate(self.found)
            if at >= self.first and at not in self.seen and product.price < self.wish["below"]
        ]
        if self.searched != wanted or not ahead:
            return f"search {wanted}"
        if ahead[0] >= self.first + self.page:
            return "next"
        return f"open {ahead[0] - self.first + 1}"

    def random_action(self, draw: Draw) -> str:
        verb = draw.one(VERBS)
        if verb == "search":
            return f"search {draw.one(COLOURS)} {draw.one(KINDS)}"
        return f"open {draw.between(1, self.page)}" if verb == "open" else verb

    def _on_page(self, number: str) -> bool:
        return number.isdigit() and 1 <= int(number) <= min(self.page, len(self.found) - self.first)

    def _shown(self) -> interface.Step:
        page = self.found[self.first : self.first + self.page]
        lines = [f"{n} {p.name} price {p.price}" for n, p in enumerate(page, start=1)]
        more = self.first + self.page < len(self.found)
        lines.append("more" if more else "end" if page else "nothing")
        return " / ".join(lines), 0.0, False, {"valid": True}

    def _met(self, product: Product) -> float:
        """The share of the wish that it meets."""
        wish = self.wish
        met = [getattr(product, part) == wish[part] for part in ("colour", "kind", "size")]
        return (sum(met) + (product.price < wish["below"])) / 4
