"""The page in headless Chromium: what it sends, shows and refuses."""

import json
import threading
from pathlib import Path

import pytest
from browser import at, download, launched_browser, parts, send, until, wait_for
from page_server import FIRST, REPLY, SECOND, Cut, Fail, Samples, Script, Text, Wait, serving


@pytest.fixture(scope="module")
def chromium():
    with launched_browser() as browser:
        yield browser


def test_text_and_sound_appear_in_order_while_they_come(chromium):
    held = threading.Event()
    reply = (*REPLY[:2], Text("wait for it, "), Wait(held), *REPLY[4:])
    with serving(Script(reply=reply)) as server, at(chromium, server) as page:
        send(page, "two tones")
        page.wait_for_selector("text=wait for it,")
        assert parts(page) == ["Sure: ", ".", "wait for it, "]
        assert page.get_attribute("article", "data-state") == "arriving"
        assert page.is_visible("#stop") and page.is_hidden("#send")
        until(page, "played.length > 0")  # it sounds before the answer is complete
        held.set()
        wait_for(page, "done")
        assert parts(page) == ["Sure: ", ".", "wait for it, ", ".", "that is all."]
        assert page.inner_text("#said").startswith("Answer: Sure: wait for it, that is all.")
        assert page.is_visible("#send") and page.is_hidden("#stop")


def test_a_caption_streams_pcm_whose_pieces_end_within_samples(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        page.check("#mode-caption", force=True)
        page.fill("#guidance", "3.5")
        page.fill("#seed", "11")
        send(page, "a tone")
        wait_for(page, "done")
        path, body, _ = server.script.requests[0]
        assert path == "/v1/audio/speech"
        assert body.pop("voice")
        assert body == {
            "model": "made-up",
            "input": "a tone",
            "response_format": "pcm",
            "seed": 11,
            "mllm_audio": {"guidance_scale": 3.5},
        }
        assert download(page, 0)[1] == FIRST
        figures = page.inner_text("article dl")
        assert "first audio" in figures and "real-time factor" in figures


def test_a_model_of_captions_offers_no_conversation(chromium):
    script = Script()
    script.model["chats"] = False
    with serving(script) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        assert page.is_hidden("label:has(#mode-chat)")
        assert page.is_checked("#mode-caption") and page.is_hidden("#record")
        send(page, "a tone")
        wait_for(page, "done")
        assert server.script.requests[0][0] == "/v1/audio/speech"


def test_settings_and_earlier_answers_are_sent(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        assert page.input_value("#guidance") == "7" and page.input_value("#steps") == "100"
        send(page, "first")
        wait_for(page, "done")
        settings = {"seed": "42", "guidance": "2", "steps": "25", "seconds": "1.5"}
        for name, value in {**settings, "temperature": "0"}.items():
            page.fill(f"#{name}", value)
        send(page, "second")
        wait_for(page, "done", 2)
        (_, first, _), (_, second, _) = server.script.requests
        assert isinstance(first.pop("seed"), int)
        assert first["mllm_audio"] == {} and first["temperature"] == 1
        assert first["messages"] == [{"role": "user", "content": "first"}]
        assert first["modalities"] == ["text", "audio"] and first["audio"]["format"] == "pcm16"
        assert (second["seed"], second["temperature"]) == (42, 0)
        wanted = {"guidance_scale": 2, "num_inference_steps": 25, "seconds": 1.5}
        assert second["mllm_audio"] == wanted
        assert second["messages"] == [
            {"role": "user", "content": "first"},
            {"role": "assistant", "audio": {"id": server.script.ids[0]}},
            {"role": "user", "content": "second"},
        ]
        assert "12 in, 9 text + 64 audio" in page.inner_text("article:nth-of-type(2) dl")
        page.click("#new")
        assert page.locator("article").count() == 0 and page.is_visible("#empty")
        page.fill("#seed", "")
        send(page, "third")
        wait_for(page, "done")
        assert server.script.requests[2][1]["messages"] == [{"role": "user", "content": "third"}]


def test_dice_and_used_seeds_fill_the_field(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.click("#dice")
        diced = page.input_value("#seed")
        send(page, "x")
        wait_for(page, "done")
        assert server.script.requests[0][1]["seed"] == int(diced)
        page.fill("#seed", "")
        page.click("text=use again")
        assert page.input_value("#seed") == diced


def test_settings_out_of_range_are_not_sent(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        page.fill("#steps", "0")
        send(page, "x")
        until(page, "document.activeElement.id === 'steps'")
        assert server.script.requests == [] and page.locator("article").count() == 0


@pytest.mark.parametrize("by", ["button", "escape"])
@pytest.mark.parametrize("mode", ["chat", "caption"])
def test_stop_hangs_up(chromium, mode, by):
    endless = Wait(threading.Event())
    script = Script(reply=(*REPLY[:2], endless), sound=(Samples(FIRST), endless))
    with serving(script) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        page.check(f"#mode-{mode}", force=True)
        send(page, "stop me")
        page.wait_for_selector(".sound")
        until(page, "played.length > 0")
        assert not script.gone.is_set()
        page.click("#stop") if by == "button" else page.keyboard.press("Escape")
        assert script.gone.wait(5)
        wait_for(page, "stopped")
        assert "Stopped." in page.inner_text("article")
        assert page.evaluate("stopped") > 0  # the sound too
        script.reply, script.sound = REPLY, (Samples(SECOND),)
        send(page, "again")
        wait_for(page, "done", 2)
        if mode == "chat":  # what was stopped is not in the conversation
            assert [m["content"] for m in script.requests[-1][1]["messages"]] == ["again"]


def test_stop_while_waiting_for_the_first_event(chromium):
    script = Script(reply=(Wait(threading.Event()),))
    with serving(script) as server, at(chromium, server) as page:
        send(page, "stop me")
        page.wait_for_selector(".state:has-text('Waiting for the server')")
        page.click("#stop")
        assert script.gone.wait(5)
        wait_for(page, "stopped")


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (400, {"message": "seconds is 9,\nexpected 2.56"}, "seconds is 9, expected 2.56"),
        (503, {"message": "the engine has stopped"}, "the engine has stopped"),
        (502, "<h1>Bad gateway</h1>", "The server answered 502 without a reason."),
    ],
)
def test_refusals_are_one_line_and_lose_nothing(chromium, status, body, line):
    text = body if isinstance(body, str) else json.dumps({"error": body})
    with serving(Script()) as server, at(chromium, server, allowed=["Failed to load"]) as page:
        page.wait_for_selector("#send:enabled")
        server.script.refusal = (status, text)
        send(page, "an unlucky prompt")
        wait_for(page, "failed")
        assert page.inner_text("article .note") == line
        assert page.input_value("#prompt") == "an unlucky prompt"
        page.keyboard.press("Enter")
        wait_for(page, "done", 2)


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (Fail("the engine died"), "the engine died"),
        (Cut(), "The connection broke before the answer was complete."),
    ],
)
def test_an_answer_that_breaks_off_says_so_and_keeps_what_came(chromium, step, line):
    script = Script(reply=(*REPLY[:2], step))
    with serving(script) as server, at(chromium, server, allowed=["ERR_INCOMPLETE"]) as page:
        send(page, "break")
        wait_for(page, "failed")
        assert page.inner_text("article .note") == line
        assert parts(page) == ["Sure: ", "."]
        assert download(page, 0)[1] == FIRST


def test_an_expired_answer_is_explained(chromium):
    with serving(Script()) as server, at(chromium, server, allowed=["404"]) as page:
        send(page, "first")
        wait_for(page, "done")
        said = {"message": "no answer is kept", "param": "messages.1.audio.id", "code": 404}
        server.script.refusal = (404, json.dumps({"error": said}))
        send(page, "second")
        wait_for(page, "failed", 2)
        assert page.inner_text("article:nth-of-type(2) .note") == (
            "The server no longer keeps the sound of an earlier answer; begin a new conversation "
            "to go on."
        )
        assert page.input_value("#prompt") == "second"


def test_a_server_that_is_gone_is_one_line(chromium):
    with serving(Script()) as server, at(chromium, server, allowed=["ERR_INTERNET"]) as page:
        page.wait_for_selector("#send:enabled")
        page.context.set_offline(True)
        send(page, "anyone?")
        wait_for(page, "failed")
        host = server.url.removeprefix("http://")
        assert page.inner_text("article .note") == f"No answer from {host}. Is the server running?"


def test_a_server_that_starts_is_waited_for(chromium):
    loading = json.dumps({"error": {"message": "the model is still loading"}})
    script = Script(refusal=(503, loading))
    with serving(script) as server, at(chromium, server, allowed=["503"]) as page:
        page.wait_for_selector("#problem:has-text('the model is still loading')")
        page.wait_for_selector("#send:enabled")
        assert page.is_hidden("#problem") and page.inner_text("#model") == "made-up"


def test_api_key_is_asked_for_sent_and_kept_for_the_tab_alone(chromium):
    script = Script(key="s3cret")
    with serving(script) as server, at(chromium, server, allowed=["401"]) as page:
        page.wait_for_selector("#problem:has-text('Unauthorized: type the API key')")
        assert page.is_disabled("#send")
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "s3cret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#send:enabled")
        assert page.is_hidden("#problem")
        send(page, "hello")
        wait_for(page, "done")
        assert script.requests[0][2] == "Bearer s3cret"
        page.reload()
        page.wait_for_selector("#send:enabled")
        assert page.evaluate("localStorage.length") == 0
        assert "s3cret" not in "".join(page.traffic)
        other = page.context.new_page()
        other.goto(server.url)
        other.wait_for_selector("#problem:has-text('Unauthorized: type the API key')")


def test_everything_has_a_name_and_fits_a_phone(chromium):
    options = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}
    with serving(Script()) as server, at(chromium, server, **options) as page:
        page.wait_for_selector("#send:enabled")
        page.fill("#prompt", "two tones")
        page.tap("#send")
        wait_for(page, "done")
        page.tap("summary")
        nameless = page.eval_on_selector_all(
            "button, input:not([hidden]), textarea, [role=slider]",
            """(all) => all.filter((one) => !(one.getAttribute("aria-label")
                || one.textContent.trim() || one.labels?.length)).map((one) => one.outerHTML)""",
        )
        assert nameless == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_policy_is_strict_and_holds(chromium):
    with serving(Script()) as server, at(chromium, server, allowed=["Content Security"]) as page:
        send(page, "<img src=x onerror='window.broken = 1'>")
        wait_for(page, "done")
        assert page.locator("article img").count() == 0
        assert page.problems == []  # the page itself breaks no rule
        assert all(url.startswith((server.url, "blob:", "data:")) for url in page.traffic)
        page.evaluate("""() => {
          const script = document.createElement("script");
          script.textContent = "window.broken = 1";
          document.body.append(script);
        }""")
        assert page.evaluate("window.broken") is None
        assert len(page.problems) == 1


def test_every_script_of_the_page_is_served(chromium):
    folder = Path(__file__).parents[1] / "mllm_audio_vllm" / "server"
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        asked = {url.removeprefix(f"{server.url}/") for url in page.traffic}
        assert {path.name for path in folder.glob("*.js")} <= asked
