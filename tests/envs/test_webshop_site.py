"""The shop as a web site, used through plain requests and in a browser."""

import dataclasses
import html
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from envs.browser import CHROMIUM, chromium
from envs.webshop_golden import three_products

from aem_jax.envs.registry import SERVED, registered
from aem_jax.envs.webshop import tasks
from aem_jax.envs.webshop.engine import Shop, Visit
from aem_jax.envs.webshop.env import WebshopConfig, WebshopEnv
from aem_jax.envs.webshop.html import render_observation, render_page
from aem_jax.envs.webshop.site import make_site
from aem_jax.envs.webshop.taggers import small


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    return Shop(three_products(tmp_path_factory.mktemp("cache")), small)


@pytest.fixture
def address(shop: Shop, monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(tasks, "SPLITS", {"valid": (0, 100)})  # the shop's one goal, whatever the split of its product
    monkeypatch.setattr("aem_jax.envs.webshop.site.SPLITS", tasks.SPLITS)
    server = uvicorn.Server(uvicorn.Config(make_site(shop), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def post(url: str, **fields: str) -> tuple[str, str]:
    """Posts a form and follows the redirect; returns the final address and the page."""
    with urllib.request.urlopen(url, urllib.parse.urlencode(fields).encode(), timeout=30) as reply:
        return reply.url, reply.read().decode()


def test_forms_post_an_agents_actions(address: str):
    with urllib.request.urlopen(address, timeout=30) as reply:
        start = reply.read().decode()
        assert "i want a red floor lamp" in start and "1 to 1 of 1" in start
    for beyond in ("1", "100000", "9" * 5000):  # the last page
        with urllib.request.urlopen(f"{address}/?from={beyond}", timeout=30) as reply:
            assert reply.read().decode() == start
    visit, page = post(f"{address}/enter/valid/0")
    assert 'id="search_input"' in page
    _, page = post(visit, query="lamp[")  # a bracket does not start a new action
    assert 'value="click[LAMP1]"' in page and "2 results" in page
    _, page = post(visit, action="click[LAMP1]")
    _, again = post(visit, action="click[nothing of that name]")
    assert page == again and "Red Floor Lamp" in page
    _, page = post(visit, action="click[buy now]")
    # easy clean is missing, and both options: (1 + 0 + 1) / 5
    assert "<b>0.40</b>" in page
    assert post(visit, action="click[buy now]")[1] == page  # the episode is over
    for path in ("/visit/none", "/?split=none"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + path, timeout=30)
    for path in ("/visit/none", "/enter/valid/1", "/enter/none/0"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            post(address + path)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_person_shops(address: str, tmp_path: Path):
    with chromium(tmp_path) as tab:
        tab.visit(address)
        tab.press("Serve")
        tab.value("document.querySelector('#search_input').value = 'red lamp'")
        tab.press("Search")
        assert "red lamp" in tab.value("document.title") and "Page 1 · 2 results" in tab.text
        tab.press("Red Floor Lamp")
        for option in ("red", "navy | blue", "small"):
            tab.press(option)
        chosen = "[...document.querySelectorAll('.option.chosen')].map(e => e.innerText.trim()).join()"
        assert tab.value(chosen) == "navy | blue,small"
        tab.press("Features")
        assert "good" in tab.text
        tab.press("‹ Red Floor Lamp")
        assert tab.value(chosen) == "navy | blue,small"
        tab.press("‹ Results")
        assert tab.value("document.querySelectorAll('.product.seen').length") == 1
        tab.press("Red Floor Lamp")
        for option in ("navy | blue", "small"):
            tab.press(option)
        tab.press("Buy Now")
        assert "0.80" in tab.text and "1 of 2: steel frame, easy clean" in tab.text
        assert tab.value("document.querySelectorAll('script, link[rel=stylesheet], img').length") == 0
        tab.press("Next customer")
        assert "What would they like?" in tab.text


def test_an_agent_reads_what_the_other_modes_show(shop: Shop):
    """No style, no kind or query of a product, no goal on the receipt, and the instruction where texts have it."""
    for repeat in (True, False):
        front = dataclasses.replace(shop, repeat_instruction=repeat)
        visit = Visit(front, front.catalog.goals[0])
        for action in ("", "search[lamp]", "click[lamp1]", "click[red]", "click[features]", "click[< prev]"):
            visit.step(action)
            page, product = render_observation(visit), front.catalog.product(0)
            assert (visit.goal.instruction in page) == (visit.goal.instruction in visit.text), action
            assert "style" not in page and "tile" not in page
            assert html.escape(product.kind) not in page and f">{product.query}<" not in page
            assert "<style>" in (person := render_page(visit)) and visit.goal.instruction in person
            assert all(html.escape(name) in page.lower() or name == "search" for name in visit.page.clickables)
        assert product.kind in person and f">{product.query}<" in person
        visit.step("click[buy now]")
        assert "0.40" in render_observation(visit) and visit.goal.attributes[1] not in render_observation(visit)
        assert visit.goal.attributes[1] in render_page(visit)


def test_an_agent_may_read_html(shop: Shop):
    env = WebshopEnv(shop, WebshopConfig(mode="html"))
    goal = shop.catalog.goals[0]
    first = env.reset({"goal": goal.to_json()})
    assert first.observation == render_observation(Visit(shop, goal)) and "&lt;" not in first.observation
    assert 'value="click[LAMP2]"' in env.step("<action>search[lamp]</action>").observation
    assert [name for name in SERVED if registered(name).site] == ["webshop"]
