"""examples/serve.py over HTTP: right answers in mixed batches, one line for what is wrong."""

from __future__ import annotations

import base64
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest

litserve = pytest.importorskip("litserve")

from browser import CHROMIUM, Browser  # noqa: E402
from conftest import blocks, section  # noqa: E402

from fusion_bench_intervmerge.solving.fit_router import fit_router  # noqa: E402

ROOT = Path(__file__).parents[1]
TASKS = ["digits", "shapes"]

spec = importlib.util.spec_from_file_location("service", ROOT / "benchmarks" / "service.py")
service = importlib.util.module_from_spec(spec)
spec.loader.exec_module(service)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A saved model, and the port it is served at: one service, which must outlive all tests.

    Stopping it fails if a process of the service is left.
    """
    folder = tmp_path_factory.mktemp("service")
    model = service.make_model("tiny", TASKS, folder, rank=4)
    fit_router(model, {t: prepared(model, service.pictures([t], 40)[t]) for t in TASKS})
    model.save_pretrained(folder / "model")
    # A batch waits long enough to be made of several requests.
    options = ("--accelerator=cpu", "--wait=0.02", "--batch=8")
    with service.serving(folder / "model", *options) as port:
        yield model, port


@pytest.fixture
def connection(served):
    connection = HTTPConnection("127.0.0.1", served[1], timeout=60)
    yield connection
    connection.close()


def prepared(model, pictures):
    """Pictures in base64 -> pixel values."""
    decoded = [service.decode_image(base64.b64decode(picture)) for picture in pictures]
    return service.pixel_values(service.image_processor(model), decoded)


def a_picture():
    return service.pictures(["digits"], 1)["digits"][0]


def half_a_picture():
    content = base64.b64decode(a_picture())
    return base64.b64encode(content[: len(content) // 2]).decode()


def test_the_task_may_be_left_to_the_router(served, connection):
    model, _ = served
    pictures = [service.pictures([task], 12)[task] for task in TASKS]
    routed = [model.route(prepared(model, some)) for some in pictures]
    for index, task in enumerate(TASKS):
        assert routed[index].count(task) > 9
    for some, tasks in zip(pictures, routed, strict=True):
        for image, task in list(zip(some, tasks, strict=True))[:4]:
            status, said = service.ask(connection, "auto", image)
            name, score = service.right_answers(model, {task: [image]})[task, 0]
            assert (status, said["task"], said["class"]) == (200, task, name)
            assert abs(said["score"] - score) < 1e-5


def classifier(model):
    """The service's own class in this process, with a model in it."""
    api = runpy.run_path(str(ROOT / "examples" / "serve.py"))["Classifier"]
    api = api("somewhere", None, None, max_batch_size=2)
    api.model, api.device = model, "cpu"
    api.heads = lambda features, indices: features[:, :8]
    api.classes = {task: list("abcdefgh") for task in TASKS}
    return api


def test_an_image_of_no_known_task_costs_the_others_nothing(served):
    class Refuses:
        tasks, encode = served[0].tasks, served[0].encode

        def route(self, images):
            return [None] * len(images)

    api = classifier(Refuses())
    images = list(prepared(served[0], 3 * [a_picture()]))
    refused, answer, again = api.predict(list(zip(images, ["auto", "shapes", "auto"], strict=True)))
    assert str(refused) == str(again) == "image: of no known task" and answer["task"] == "shapes"
    (alone,) = api.predict([(images[0], "auto")])
    assert str(alone) == "image: of no known task"


BAD = {
    "no image": ({"task": "digits"}, "image: Field required"),
    "a task of another type": (
        {"task": ["digits"], "image": a_picture()},
        "task: Input should be a valid string",
    ),
    "an unknown task": (
        {"task": "wasps", "image": a_picture()},
        "task: there is no 'wasps', but digits, shapes, auto",
    ),
    "no base64": ({"task": "digits", "image": "%%"}, "image: not in base64"),
    "no letters of ASCII": ({"task": "digits", "image": "é"}, "image: not in base64"),
    "an empty one": (
        {"task": "digits", "image": ""},
        "image: not an image (PNG, JPEG, WEBP, GIF, BMP)",
    ),
    "half a picture": ({"task": "digits", "image": half_a_picture()}, "image: damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_line(name, connection):
    request, said = BAD[name]
    assert service.ask(connection, **request) == (422, {"detail": said})


FORM, JSON = "application/x-www-form-urlencoded", "application/json"


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b'{"task": ', JSON, 422, "request: JSON decode error"),
        (b"", JSON, 422, "request: Field required"),
        (b"[]", JSON, 422, "request: Input should be a valid dictionary"),
        (b"\xff", JSON, 400, "There was an error parsing the body"),
        (b"[" * 100_000, JSON, 400, "There was an error parsing the body"),
        (b"task=digits&image=AAAA", FORM, 422, "request: Input should be a valid dictionary"),
        (b"--x--", "multipart/form-data; boundary=x", 422, "request: Input should be a valid"),
        (b'"' + 25_000_000 * b"A" + b'"', JSON, 413, "Payload too large"),
    ],
    ids=["half a JSON", "nothing", "a list", "bytes", "deep", "a form", "parts", "too much"],
)
def test_a_body_that_is_no_request(body, kind, status, said, connection):
    connection.request("POST", "/predict", body, {"Content-Type": kind})
    response = connection.getresponse()
    assert response.status == status
    assert service.json.loads(response.read())["detail"].startswith(said)


def test_bad_requests_cost_the_good_ones_of_their_batch_nothing(served):
    model, port = served
    right = {}

    def client():
        right.update(service.load(port, model, requests=120, clients=6, images_a_task=8))

    good = threading.Thread(target=client)
    good.start()
    connection, refused = HTTPConnection("127.0.0.1", port, timeout=60), 0
    while good.is_alive():
        request, said = list(BAD.values())[refused % len(BAD)]
        assert service.ask(connection, **request) == (422, {"detail": said})
        refused += 1
    connection.close()
    assert right["requests"] == 120 and right["wrong"] == 0 and refused > 10
    assert right["largest deviation of a score"] < 1e-5


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere", "nowhere: no saved model"),
        ("torn", "torn: no saved model"),
        ("unknown", "unknown does not know its tasks' classes; name them by --classes FILE"),
    ],
)
def test_a_model_that_cannot_be_served(model, said, tmp_path, monkeypatch):
    for name in ("torn", "unknown"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "unknown" / "config.json").write_text('{"tasks": ["ants"], "metadata": {}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve.py", model])
    with pytest.raises(SystemExit, match=said) as stopped:
        runpy.run_path(str(ROOT / "examples" / "serve.py"), run_name="__main__")
    assert "\n" not in str(stopped.value)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to open the page in")
def test_the_page_takes_what_is_drawn_and_dropped(served, tmp_path):
    model, port = served
    (tmp_path / "one.png").write_bytes(base64.b64decode(a_picture()))
    name, score = service.right_answers(model, {"shapes": [a_picture()]})["shapes", 0]
    answer, send = "document.querySelector('#answer b')", "form.requestSubmit()"
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        assert (
            browser.evaluate("[...task.options].map(o => o.value).join()") == "auto,digits,shapes"
        )
        browser.evaluate("task.value = 'digits'")
        drawn = "board.toDataURL()"
        before = browser.evaluate(drawn)
        browser.drag("#board", [(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)])
        assert browser.evaluate(drawn) != before
        browser.evaluate(send)
        assert (
            browser.wait_for(f"{answer} && {answer}.textContent")
            in (model.metadata["classes"]["digits"]["names"])
        )
        browser.evaluate("task.value = 'shapes'")
        browser.drop("#board", str(tmp_path / "one.png"))
        browser.wait_for("dropped")
        assert browser.evaluate("answer.textContent") == ""
        browser.evaluate(send)
        assert browser.wait_for(f"{answer} && {answer}.textContent") == name
        share = browser.evaluate("document.querySelector('#answer meter').value")
        assert abs(share - score) < 1e-4  # the file itself was sent, not the canvas
        assert browser.console == []
        browser.evaluate("dropped = 'AAAA'; " + send)
        said = browser.wait_for("document.querySelector('#answer.bad') && answer.textContent")
        assert said.startswith("image: not an image")


# -- docs/deployment.md ---------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_what_the_page_asks_is_answered(served, tmp_path):
    (tmp_path / "image.png").write_bytes(base64.b64decode(a_picture()))
    command = blocks("deployment.md#A service")[1].replace(":8000", f":{served[1]}")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True)
    assert service.json.loads(done.stdout).keys() == {"task", "class", "score"}


def test_the_page_names_the_scripts_options_and_their_defaults():
    page = section("deployment.md#A service")
    script = (ROOT / "examples" / "serve.py").read_text()
    for option, value in re.findall(r"`(--[a-z]+)(?: ([\d.]+))?`", page):
        default = f"default={value}," if value and option != "--host" else ""
        assert re.search(rf'"{option}".*{default}', script), option
