import contextlib
import time

import pytest

from aem_jax.envs.swe.calls import CallError, find_call


def block(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<function={name}>\n{inner}</function>"


def test_a_call_has_a_name_and_parameters():
    call = find_call(f"I look around.\n{block('execute_bash', command='ls -la')}\n")
    assert (call.name, dict(call.parameters), call.others) == ("execute_bash", {"command": "ls -la"}, 0)


def test_values_keep_all_but_the_line_breaks_of_their_tags():
    text = "\n  indented\n\n"
    assert find_call(block("f", a=text)).parameters["a"] == text
    assert find_call("<function=f><parameter=a>x y</parameter></function>").parameters["a"] == "x y"
    assert find_call("<function=finish>\n</function>").parameters == {}


def test_values_may_contain_tags():
    text = 'x = "</parameter>"\ny = "</function>"\nz = "<function=g>"\nw = "<parameter=q>"'
    call = find_call(block("file_editor", file_text=text, path="a.py"))
    assert call.parameters == {"file_text": text, "path": "a.py"}
    assert call.others == 0


def test_the_last_call_is_executed_and_earlier_ones_are_counted():
    call = find_call(block("a", x="1") + "\nor rather\n" + block("b", x="2"))
    assert (call.name, call.others) == ("b", 1)


def test_calls_inside_thinking_are_ignored():
    assert find_call(f"<think>{block('a', x='1')}</think>{block('b', x='2')}").others == 0
    with pytest.raises(CallError, match="got none"):
        find_call(f"<think>{block('a', x='1')}</think>now I know")


def test_the_closing_tag_may_be_missing_at_the_end():
    assert find_call("<function=f>\n<parameter=a>\nx\n</parameter>\n").parameters == {"a": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no call", "expected a call of a tool, got none"),
        ("<function=f>\nls\n</function>", "expected <parameter=...> or </function> in the call of 'f'"),
        ("<function=f>\n<parameter=a>\nls\n</function>", "expected </parameter> after the parameter 'a'"),
        ("<function=>\n</function>", "expected <function=name>"),
        ("<function=a b>\n</function>", "expected <function=name>"),
        ("<function=" + "x" * 1000, "expected <function=name>"),
        (block("f", a="1").replace("</function>", "<parameter=a>\n2\n</parameter></function>"), "'a' twice"),
    ],
)
def test_errors_describe_the_invalid_part(text, message):
    with pytest.raises(CallError, match=message):
        find_call(text)


def test_an_invalid_call_does_not_hide_a_valid_one():
    assert find_call("<function=a>\nls\n" + block("b", x="1")).name == "b"
    assert find_call(block("b", x="1") + "<function=a>\n<parameter=x>\n").name == "b"


@pytest.mark.parametrize("piece", ["<function=f>", "<parameter=a>", "</parameter>", "<function=f><parameter=a>", " "])
def test_parsing_time_is_linear_in_the_length(piece):
    began = time.perf_counter()
    for end in ("", "</parameter>", "</parameter><parameter=a>x</parameter>"):
        with contextlib.suppress(CallError):
            find_call("<function=f>\n<parameter=a>\n" + piece * 20_000 + end)
    assert time.perf_counter() - began < 5  # 0.1 s; a new read from each tag takes minutes
