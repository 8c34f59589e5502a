"""The shop against recordings of the original, and its behaviour beyond the recordings."""

from pathlib import Path

import pytest
from envs.webshop_golden import three_products, unpack

from aem_jax.envs.testing import replay
from aem_jax.envs.webshop import taggers
from aem_jax.envs.webshop.engine import Shop, Visit
from aem_jax.envs.webshop.goals import Goal, goal_from_json
from aem_jax.envs.webshop.pages import Kind, Page, plain
from aem_jax.envs.webshop.products import product_from_json
from aem_jax.envs.webshop.reward import alike, matched_options, plain_colour, score, type_match


def test_every_recorded_step_of_the_original(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = unpack(tmp_path)
    arguments = ["webshop", "--data", str(folder), "--transcripts", str(folder / "transcripts.jsonl")]
    assert replay.main(arguments) == 0
    assert capsys.readouterr().out == "steps 722, mismatches 0\n"
    # proof that the comparison can fail: an extra button, a smaller reward
    text = (folder / "transcripts.jsonl").read_text()
    (folder / "transcripts.jsonl").write_text(
        text.replace('["search"]', '["search", "x"]', 1).replace(": 1.0,", ": 0.9,", 1)
    )
    assert replay.main(arguments) == 1
    assert capsys.readouterr().out.endswith("steps 722, mismatches 2\n")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(three_products(tmp_path), taggers.small)


@pytest.fixture
def visit(shop: Shop) -> Visit:
    return Visit(shop, shop.catalog.goals[0])


def test_a_purchase(visit: Visit):
    assert visit.page.has_search_bar and visit.page.clickables == ["search"]
    visit.step("search[Floor LAMP]")
    assert visit.page.clickables == ["back to search", "next >", "lamp2", "lamp1"]  # the shorter text first
    assert not visit.page.has_search_bar
    visit.step("click[lamp1]")
    assert visit.page.clickables[-4:] == ["navy | blue", "red", "small", "large"]
    for option in ("red", "navy | blue", "small"):
        visit.step(f"click[{option}]")
    assert visit.chosen == {"color": "navy | blue", "size": "small"}
    assert visit.rich.startswith("You have clicked small.\nYou have clicked navy | blue.\nInstruction:\n")
    visit.step("click[features]")
    assert visit.page.clickables == ["back to search", "< prev"] and visit.text.endswith("< Prev [SEP] good")
    visit.step("click[< prev]")
    assert visit.chosen == {"color": "navy | blue", "size": "small"} and visit.bought is None
    visit.step("click[buy now]")
    # steel frame is annotated, easy clean is nowhere; both options; 20 dollars are below any limit: (1 + 2 + 1) / 5
    assert visit.done and visit.bought == "LAMP1" and visit.reward == 4 / 5
    assert '{"color": "navy | blue", "size": "small"}' in visit.text and visit.page.clickables == []
    with pytest.raises(ValueError, match="ended with a purchase"):
        visit.step("click[buy now]")


@pytest.mark.parametrize(
    "action", ["buy", "search[]", "click[search]", "click[lamp1]", "CLICK[search]", "find[lamp]", ""]
)
def test_an_impossible_action_changes_nothing(visit: Visit, action: str):
    before = visit.page
    visit.step(action)
    assert visit.page == before and not visit.acted
    visit.step("search[tea]")
    assert visit.acted


def test_a_search_resets_the_item_and_keeps_seen_products(visit: Visit):
    visit.step("search[lamp]")
    visit.step("click[lamp1]")
    visit.step("click[red]")
    visit.step("search[lamp]")  # possible on any page
    assert visit.chosen == {} and "[clicked button] LAMP1" in visit.rich and "[button] LAMP2" in visit.rich
    visit.step("click[back to search]")
    visit.step("search[lamp]")
    assert "[button] LAMP1" in visit.rich  # the search page clears it


def test_pages_go_on_past_the_last_product(visit: Visit):
    visit.step("search[lamp]")
    visit.step("click[next >]")
    assert visit.page.clickables == ["back to search", "< prev", "next >"]
    assert "Page 2 (Total results: 2)" in visit.text
    visit.step("click[< prev]")
    assert "lamp2" in visit.page.clickables


def test_other_kinds_of_search(visit: Visit, shop: Shop):
    for action, products in (
        ("search[<c> grocery]", {"TEA1"}),
        ("search[<q> floor lamp]", {"LAMP1", "LAMP2"}),
        ("search[<a> steel frame]", {"LAMP1"}),
        ("search[<c>]", set()),
        ("search[<r>]", {"LAMP1", "LAMP2", "TEA1"}),
    ):
        visit.step(action)
        assert {text for kind, text in visit.page.pieces if kind is Kind.PRODUCT} == products
    order = [text for kind, text in visit.page.pieces if kind is Kind.PRODUCT]
    again = Visit(shop, visit.goal)
    again.step("search[<r>]")
    assert [text for kind, text in again.page.pieces if kind is Kind.PRODUCT] == order  # random, but the same each time


def test_quirks_of_addresses(visit: Visit):
    """Pages are distinguished by their addresses, which contain search words. The original's quirks are kept."""
    visit.step('search["red" lamp]')
    visit.step("click[lamp1]")
    assert "[clicked button] red" in visit.rich and visit.chosen == {}  # the quoted word looks like a choice
    visit.step("search[item_page lamp]")
    visit.step("click[lamp1]")
    visit.step("click[description]")
    visit.step("click[< prev]")
    assert "Page 1 (Total results: 2)" in visit.text  # to the results, not to the item


def test_an_attributes_page_and_pages_without_instruction(shop: Shop):
    visit = Visit(Shop(shop.catalog, shop.nouns, show_attributes=True, repeat_instruction=False), shop.catalog.goals[0])
    assert visit.goal.instruction in visit.text
    visit.step("search[lamp]")
    assert visit.goal.instruction not in visit.text
    visit.step("click[lamp1]")
    visit.step("click[attributes]")
    assert visit.text.endswith("< Prev [SEP] steel frame [SEP] garden [SEP] floor lamp [SEP] Home › Lighting › Lamps")


def test_goals_and_cleaned_products(shop: Shop, tmp_path: Path):
    lamp, other, tea = (shop.catalog.product(i) for i in range(3))
    assert len(shop.catalog) == 3 and lamp.options == {"color": ("navy | blue", "red"), "size": ("small", "large")}
    assert (lamp.price_tag, other.price_tag, tea.price_tag) == ("$20.0", "$30.0 to $50.0", "$100.0")
    assert 30 <= shop.catalog.prices[1] <= 50 and shop.catalog.prices[2] == 100
    (goal,) = shop.catalog.goals  # one of the two instructions has no requirements
    assert goal.instruction == f"i want a red floor lamp, and price lower than {goal.price_limit:.2f} dollars"
    assert goal.price_limit in (40, 50, 60)  # the greater of two of 30, 40, 50, 60
    assert goal_from_json(goal.to_json()) == goal and product_from_json(lamp.to_json()) == lamp
    with pytest.raises(ValueError, match="expected a product of shop"):
        shop.catalog.find("LAMP3")
    synthetic = three_products(tmp_path, "synthetic").goals
    options = [goal.options for goal in synthetic]
    assert {"color": "red", "size": "small"} in options and len(options) == 4
    texts = {goal.instruction.split(", and price")[0] for goal in synthetic}
    assert "Find me a lamp with color: navy | blue, and size: large" in texts and len(texts) == 4


def wanted(**fields) -> Goal:
    return Goal(
        **{
            "asin": "X",
            "category": "garden",
            "query": "floor lamp",
            "title": "Floor Lamp",
            "kind": "Home › Lighting › Lamps",
            "instruction": "",
            "attributes": ("easy clean",),
            "options": (),
            "price_limit": 40.0,
        }
        | fields
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1.0),
        # one noun of six in common, with the same query: right kind; with another query and tree: doubtful
        ({"title": "Lamp Sofa Table Chair Desk Couch"}, 1.0),
        ({"title": "Lamp Sofa Table Chair Desk Couch", "query": "sofa"}, 1.0),  # two parts of the tree in common
        ({"title": "Lamp Sofa Table Chair Desk Couch", "query": "sofa", "kind": "Home › Sofas"}, 0.5),
        # one of eleven is less than a tenth; none gives 0, whatever the query
        ({"title": "Lamp Sofa Table Chair Desk Couch Stool Bench Shelf Rug Mat"}, 0.1),
        ({"title": "Sofa"}, 0.0),
        ({"title": "the"}, 1.0),  # without nouns the share is 0.2; the query is right
        ({"title": "the", "query": "sofa", "kind": "Home"}, 0.5),
    ],
)
def test_the_type_of_a_purchase(shop: Shop, fields: dict, expected: float):
    assert type_match(shop.catalog.product(0), wanted(**fields), taggers.small) == expected


def test_the_parts_of_a_score(shop: Shop):
    lamp = shop.catalog.product(1)  # 'Easy Clean shade' is in its description; it costs 30 to 50
    result = score(lamp, 45.0, ["olive green", "large"], wanted(options=("green", "small")), taggers.small)
    assert (result.type, result.attributes, result.options, result.affordable) == (1.0, 1, 1, False)
    assert result.reward == (1 + 1 + 0) / (1 + 2 + 1)
    assert score(lamp, 40.0, [], wanted(), taggers.small).reward == 1.0


def test_similar_words_match():
    assert alike("Easy Clean!", "clean easy easy") and alike("small", "size: small")
    assert not alike("small", "large")
    # the share of letters in common and in order, in percent: 2·6/14 = 85.7 rounds to 86, 2·9/22 to 82
    assert alike("abcdefg", "abcdefx") and not alike("abcdefghij", "abcdefghixyz")
    assert not alike("", "")
    assert plain_colour("navy blue") == "blue" and plain_colour("size 9") == "size 9"
    assert plain_colour(("color", "red")) == "red" and plain_colour(("color", "dark red")) == "('color', 'dark red')"
    assert matched_options(["navy blue", "small"], ("light blue", "small", "large")) == 2
    assert matched_options(["small", "red"], {"size": "small", "color": "red"}) == 2


def test_blank_texts_are_shortened_as_by_an_html_parser(shop: Shop):
    assert plain(Page(((Kind.TEXT, " a "), (Kind.BUTTON, "B")), "")) == "a [SEP] B"
    from aem_jax.envs.webshop.pages import sub_page

    lamp = shop.catalog.product(0)  # has an empty description: no piece at all
    assert sub_page("x", "", lamp, "Description").pieces[-1] == (Kind.BUTTON, "< Prev")


def test_taggers():
    assert taggers.recorded("The Soft 2-in-1 T-Shirt, 10oz") == ("t", "shirt")
    assert taggers.small("Beautiful Waterproof Red Floor Lamp for the Kitchen 2x") == ("floor", "lamp", "kitchen")
    assert taggers.resolve("auto") in ("spacy", "small") and taggers.resolve("recorded") == "recorded"
    with pytest.raises(ValueError, match="expected a tagger of auto, spacy, small, recorded, got 'x'"):
        taggers.tagger("x")
    if not taggers.has_spacy():
        with pytest.raises(ValueError, match="choose the tagger 'small'"):
            taggers.tagger("spacy")
