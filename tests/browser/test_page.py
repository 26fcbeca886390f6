"""The page at ``/`` in a real browser, over a real server with tiny real models."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from tests.unit.tiny_service import KEY, served

pytestmark = pytest.mark.browser
#: All that the models can say: markup would show at once if the page took it for its own.
WORDS = [" sea", " wind", " sail", " night,", "<script>document.title='taken'</script>", "<img src=x onerror=fail()>"]
LABEL = "<b>storm</b>"
CONTEXT, MOST_NEW = 4096, 3000
SECONDS = 15
T = TypeVar("T")


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    from transformers import AutoModelForCausalLM

    from distft.serving.classifier import Classifier
    from distft.serving.protocol import Model
    from distft.serving.service import Judge, LocalService, Writer
    from distft.serving.transformers_engine import TransformersEngine
    from tests.unit.test_serving_service import CHAT, SPECIAL, classifier_of, config
    from tests.unit.tiny_models import tokenizer

    words = tokenizer(SPECIAL, template=CHAT, bos_token="<|im_start|>", eos_token="<|im_end|>")
    first = len(words)
    words.add_tokens(WORDS)

    def engine(seed: int) -> TransformersEngine:
        torch.manual_seed(seed)
        made = config()
        made.vocab_size, made.max_position_embeddings = len(words), CONTEXT
        model = AutoModelForCausalLM.from_config(made).eval()
        with torch.no_grad():  # one of the words is likelier than all else, so that answers never end of themselves
            model.lm_head.weight[:first] = 0
            model.lm_head.weight[-1] = -model.lm_head.weight[first:-1].sum(0)
        return TransformersEngine(model, words, concurrent=4, memory_bytes=1 << 26)

    judging = classifier_of()
    judging.config.id2label = {**judging.config.id2label, 1: LABEL}
    engines = [engine(1), engine(2)]
    service = LocalService(
        [
            Writer(Model("tuned", "generation", 1, 0, chat=True), engines[0]),
            Writer(Model("org/base", "generation", 1, 0, chat=True), engines[1]),
            Writer(Model("plain", "language_modeling", 1, 0, chat=False), engines[1]),
            Judge(Model("judge", "classification", 1, CONTEXT, chat=False), Classifier(judging, words)),
        ],
        max_new_tokens=MOST_NEW,
        most=4,
    )
    with served(service) as found:
        found.engines = engines
        yield found
    asyncio.run(service.close())


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Any, url: str) -> None:
        self._browser = browser
        self._log: list[dict[str, Any]] = []
        self.said(), self.requests()  # what pages before this one left
        self._log.clear()
        browser.get(url)

    def __getitem__(self, name: str) -> Any:
        return self._browser.find_element("id", name)

    def run(self, script: str) -> Any:
        return self._browser.execute_script(script)

    def until(self, what: Callable[[], T]) -> T:
        end = time.monotonic() + SECONDS
        while not (found := what()):
            assert time.monotonic() < end, self["main"].text + self["status"].text
            time.sleep(0.02)
        return found

    def fill(self, name: str, text: str) -> None:
        self[name].clear()
        self[name].send_keys(text)

    def connect(self, key: str = KEY) -> None:
        self.fill("key", key)
        self["connect"].click()
        self.until(lambda: self["main"].is_displayed())

    def choose(self, **values: str) -> None:
        for name, value in values.items():
            self[name].find_element("css selector", f"option[value='{value}']").click()

    def send(self, text: str) -> None:
        """Sends a text, and waits for all answers to it."""
        self.fill("text", text)
        self["send"].click()
        self.idle()

    def idle(self) -> None:
        self.until(lambda: self["send"].is_enabled())

    def turns(self, model: str, who: str = "assistant") -> list[str]:
        found = self[f"answers-{model}"].find_elements("css selector", f".{who}")
        return [each.get_property("textContent") for each in found]

    def said(self) -> list[str]:
        """What the console has said since the last call."""
        return [each["message"] for each in self._browser.get_log("browser")]

    def requests(self) -> list[tuple[str, Any]]:
        """Address and JSON body of every request of the page so far, whatever became of it."""
        self._log += (json.loads(each["message"])["message"] for each in self._browser.get_log("performance"))
        sent = [each["params"]["request"] for each in self._log if each["method"] == "Network.requestWillBeSent"]
        return [(each["url"], json.loads(each.get("postData", "null"))) for each in sent]


@pytest.fixture
def page(browser: Any, server: SimpleNamespace) -> Iterator[Page]:
    """The page; afterwards, nothing may have gone wrong in silence."""
    made = Page(browser, server.url)
    yield made
    assert made.said() == []  # neither errors nor violations of the content security policy
    assert {url for url, _ in made.requests() if not url.startswith((f"{server.url}/", "data:,"))} == set()
    assert made.run("return [document.cookie, localStorage.length, sessionStorage.length, document.title]") == [
        *("", 0, 0, "distft")
    ]


def answer_to(server: SimpleNamespace, model: str, messages: list[dict[str, str]], tokens: int) -> str:
    """What a model says without HTTP or a page."""
    from distft.serving.protocol import Question, Sampling

    async def asked() -> str:
        question = Question(model, messages=tuple(messages), sampling=Sampling(tokens))
        return "".join([piece.text async for piece in server.service.answer(question)])

    return asyncio.run(asked())


def test_a_wrong_key_is_told_in_words_and_the_right_one_connects(page: Page) -> None:
    page.fill("key", "sk-wrongwrongwrong")
    page["connect"].click()
    page.until(lambda: page["status"].text == "this API key is not known here")
    assert not page["main"].is_displayed()
    assert [each for each in page.said() if "401" not in each] == []
    page.fill("key", "sk-ключ-ключ-ключ\n")  # Enter connects as well
    page.until(lambda: "beyond ASCII" in page["status"].text)
    page.connect()
    assert page["status"].text == "4 models here."
    assert [page[name].get_property("value") for name in ("model", "beside", "mode")] == ["tuned", "org/base", "chat"]


def test_an_answer_appears_piece_by_piece_in_both_columns(page: Page, server: SimpleNamespace) -> None:
    page.connect()
    page.fill("tokens", "100")
    page.run(  # what is seen at each frame
        "window.seen = {}; const look = () => { document.querySelectorAll('article').forEach((each) =>"
        " (seen[each.id] ??= new Set()).add(each.querySelector('.assistant')?.textContent.length));"
        " requestAnimationFrame(look); }; look()"
    )
    page["text"].send_keys("one\ue008\ue007\ue000two\ue007")  # Shift+Enter breaks the line, Enter sends
    page.idle()
    for model in ("tuned", "org/base"):
        assert page.turns(model, "user") == ["one\ntwo"]
        expected = answer_to(server, model, [{"role": "user", "content": "one\ntwo"}], 100)
        assert page.turns(model) == [expected]
        assert "Tokens: 100 in" in page[f"answers-{model}"].text
        assert page.run(f"return seen['answers-{model}'].size") > 5
    assert page.turns("tuned") != page.turns("org/base")
    assert page["text"].get_property("value") == ""


def test_a_chat_goes_on_and_clear_begins_a_new_one(page: Page, server: SimpleNamespace) -> None:
    page.connect()
    page.choose(beside="")
    page.fill("tokens", "8")
    page.send("Who goes there?")
    page.send("And who else?")
    first, second = page.turns("tuned")
    messages = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": first}]
    messages.append({"role": "user", "content": "And who else?"})
    assert page.requests()[-1][1]["messages"] == messages
    assert second == answer_to(server, "tuned", messages, 8)
    page["clear"].click()
    assert page.turns("tuned") == []
    page.send("And who else?")
    assert page.requests()[-1][1]["messages"] == messages[2:]


def test_stop_ends_the_answers_and_frees_their_places(
    page: Page, server: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    page.connect()
    page.fill("tokens", str(MOST_NEW))
    page.fill("text", "Tell me everything.")
    page["send"].click()
    page.until(lambda: all("".join(page.turns(model)) for model in ("tuned", "org/base")))
    assert sum(each.busy() for each in server.engines) == 2
    assert not page["clear"].is_enabled()
    page["stop"].click()
    page.idle()
    end = time.monotonic() + 1
    while sum(each.busy() for each in server.engines) or server.app.state.gate.running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert page["answers-tuned"].text.endswith("Stopped.")
    assert [each.getMessage() for each in caplog.records if each.name == "distft"] == []  # it is no fault of the server
    so_far = page.turns("tuned")[0]
    page.fill("tokens", "4")
    page.send("Go on.")  # what was seen is part of the conversation
    assert page.requests()[-1][1]["messages"][1]["content"] in (so_far, page.turns("org/base")[0])


def test_a_text_is_completed_where_a_model_knows_no_conversations(page: Page) -> None:
    page.connect()
    page.choose(mode="completion", beside="")
    page.fill("tokens", "6")
    page.send("Once upon")
    assert page.requests()[-1][1]["prompt"] == "Once upon"
    assert page.turns("tuned")[0]
    page.choose(mode="chat", model="plain")
    assert page["mode"].get_property("value") == "completion"
    assert not page["mode"].find_element("css selector", "[value=chat]").is_enabled()
    page.send("Once upon")
    assert page.turns("plain")[0]


def test_a_classification_shows_probabilities(page: Page) -> None:
    page.connect()
    page.choose(model="judge", beside="")
    assert not page["temperature"].is_displayed()
    page.send("Thunder, all night.")
    rows = page["answers-judge"].find_elements("css selector", "tr")
    shares = [float(each.find_element("css selector", "td").text) for each in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=0.002)
    assert {each.find_element("css selector", "th").text for each in rows} == {"calm", LABEL, "fog"}
    bars = [float(each.get_property("value")) for each in page["answers-judge"].find_elements("css selector", "meter")]
    assert sum(bars) == pytest.approx(1, abs=1e-6)


def test_markup_is_text_whoever_wrote_it(page: Page) -> None:
    page.connect()
    page.fill("tokens", "60")
    page.send("<script>document.title='taken'</script><img src=x onerror=fail()>")
    answers = page.turns("tuned")[0] + page.turns("org/base")[0]
    assert "<script>" in answers
    assert "<img" in answers
    assert page.turns("tuned", "user") == ["<script>document.title='taken'</script><img src=x onerror=fail()>"]
    assert page.run("return document.querySelectorAll('main script, main img').length") == 0


def test_an_error_is_told_in_its_column_and_the_text_is_not_lost(page: Page) -> None:
    page.connect()
    page.choose(beside="judge")
    page.fill("tokens", "99999")
    page.send("Hello")
    assert "max_tokens should be less than or equal to 4096" in page["answers-tuned"].text
    assert page["answers-judge"].find_elements("css selector", "meter")
    assert page["status"].text == "Not every model answered."
    page.choose(beside="")
    page.send("Hello")
    assert page["text"].get_property("value") == "Hello"
    assert [each for each in page.said() if "400" not in each] == []
