"""The shop as a web site for people: `python -m aem_jax.launch serve webshop --html`.

Every button posts an agent's action, `search[…]` or `click[…]`. The engine executes it, and the pages show its state.
"""

import secrets
from collections import OrderedDict
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from aem_jax.envs.webshop.engine import Shop, Visit
from aem_jax.envs.webshop.html import render, render_page
from aem_jax.envs.webshop.tasks import SPLITS, goal_tasks

MAX_VISITS = 1000
"""Maximum number of visits that are kept. The oldest ones are dropped."""
_SHOWN = 12


def make_site(shop: Shop, held_out: str = "products") -> Starlette:
    """Makes the ASGI application.

    Args:
        shop: data that visits share.
        held_out: unit that the displayed splits do not share, one of `HELD_OUT`.
    """
    visits: OrderedDict[str, tuple[Visit, str]] = OrderedDict()
    tasks = {split: goal_tasks(shop.catalog, split, held_out) for split in SPLITS}

    async def start(request: Request) -> Response:
        split = request.query_params.get("split", "valid")
        first = _number(request.query_params.get("from"))
        if split not in tasks:
            return _sorry(f"There is no split {split!r}.", 404)
        first = min(first, (len(tasks[split]) - 1) // _SHOWN * _SHOWN)  # no later than the last page
        goals = [shop.catalog.goals[number] for number in tasks[split].numbers[first : first + _SHOWN]]
        values = {"split": split, "splits": list(tasks), "first": first, "shown": _SHOWN, "total": len(tasks[split])}
        return HTMLResponse(render("start.html.j2", catalog=shop.catalog, goals=goals, **values))

    async def enter(request: Request) -> Response:
        split, number = request.path_params["split"], request.path_params["number"]
        if split not in tasks or number >= len(tasks[split]):
            return _sorry("There is no such customer.", 404)
        name = secrets.token_hex(8)
        visits[name] = (
            Visit(shop, shop.catalog.goals[tasks[split].numbers[number]], name),
            f"{split}/{(number + 1) % len(tasks[split])}",
        )
        while len(visits) > MAX_VISITS:
            visits.popitem(last=False)
        return RedirectResponse(f"/visit/{name}", 303)

    async def show(request: Request) -> Response:
        entry = visits.get(request.path_params["visit"])
        if entry is None:
            return _sorry("This visit is over.", 404)
        visit, following = entry
        return HTMLResponse(render_page(visit, f"/visit/{request.path_params['visit']}", following=following))

    async def act(request: Request) -> Response:
        entry = visits.get(request.path_params["visit"])
        if entry is None:
            return _sorry("This visit is over.", 404)
        form = dict(parse_qsl((await request.body()).decode(errors="replace")))
        action, query = form.get("action", ""), form.get("query", "")
        if not entry[0].done:
            entry[0].step(action or f"search[{query.strip()}]")
        return RedirectResponse(f"/visit/{request.path_params['visit']}", 303)

    return Starlette(
        routes=[
            Route("/", start),
            Route("/enter/{split}/{number:int}", enter, methods=["POST"]),
            Route("/visit/{visit}", show),
            Route("/visit/{visit}", act, methods=["POST"]),
        ]
    )


def _number(text: str | None) -> int:
    return int(text[:9]) if text and text.isascii() and text.isdigit() else 0


def _sorry(text: str, status: int) -> Response:
    return HTMLResponse(render("sorry.html.j2", text=text), status)
