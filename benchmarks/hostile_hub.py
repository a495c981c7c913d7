"""Failures of a hub and of its files, by the real command:
``python benchmarks/hostile_hub.py [CASE...]``.

A hub is emulated on loopback with tiny random models; one thing is wrong in each case. Printed are
the lines on the screen, tracebacks among them, seconds, and the line that says what is wrong.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

COMMAND = str(Path(sys.executable).with_name("fusion_bench"))
BASE, EXPERTS = "here/clip", {"ants": "here/clip_ants", "bees": "here/clip_bees"}
SHA = "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories from folders; ``wrong`` answers one of them in its own way."""

    root: Path
    wrong: ClassVar[dict[str, Callable[[Hub], None]]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        is_api = path.startswith("api/models/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo in self.wrong:
            self.wrong[repo](self)
        elif is_api:
            names = [file.name for file in (self.root / repo).iterdir()]
            about = {"id": repo, "sha": SHA, "siblings": [{"rfilename": n} for n in names]}
            self.send(json.dumps(about | {"private": False, "tags": []}).encode())
        elif (self.root / repo / path.rpartition("/")[2]).is_file():
            self.send((self.root / repo / path.rpartition("/")[2]).read_bytes())
        else:
            self.fail(404, "EntryNotFound")

    def send(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fail(self, status: int, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def fails(status: int, code: str = "") -> Callable[[Hub], None]:
    return lambda hub: hub.fail(status, code)


def cut(hub: Hub) -> None:
    """A file that ends before its length is reached."""
    name = hub.path.rpartition("/")[2]
    if name != "model.safetensors":
        Hub.wrong, wrong = {}, Hub.wrong
        hub.do_GET()
        Hub.wrong = wrong
    else:
        body = (hub.root / EXPERTS["bees"] / name).read_bytes()
        hub.send(body[:1000], len(body))


def models(root: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4}
    sizes = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    for repo in (BASE, *EXPERTS.values(), "here/wide"):
        hidden = {"intermediate_size": 96} if repo == "here/wide" else {}
        model = CLIPModel(
            CLIPConfig(
                text_config={**small, "vocab_size": 64, "max_position_embeddings": 8},
                vision_config={**small, **sizes, **hidden},
                projection_dim=16,
            )
        )
        model.save_pretrained(root / repo)
    (root / "here/broken").mkdir()
    shutil.copy(root / BASE / "config.json", root / "here/broken")
    (root / "here/broken/model.safetensors").write_bytes(b"\0" * 512)


def pictures(folder: Path) -> dict[str, str]:
    """Parquet files: a good one, one with other columns, a cut one, one with a broken image."""
    items = [Pictures.effect_noise((32, 32), 30 + n).convert("RGB") for n in range(40)]
    good = {"image": items, "label": list(range(40))}
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(good, features=features).to_parquet(folder / "good.parquet")
    Dataset.from_dict(good, features=features).rename_columns(
        {"image": "img", "label": "fine_label"}
    ).to_parquet(folder / "columns.parquet")
    Dataset.from_dict(good, features=features).remove_columns("label").to_parquet(
        folder / "unlabelled.parquet"
    )
    body = (folder / "good.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(body[: len(body) // 2])
    (folder / "text.parquet").write_text("<html>502 Bad Gateway</html>")
    return {file.stem: str(file) for file in folder.glob("*.parquet")}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("hub", "data", "config/modelpool"):
            (root / name).mkdir(parents=True)
        models(root / "hub")
        files = pictures(root / "data")
        CLIPImageProcessor(size=32, crop_size=32).save_pretrained(root / "processor")
        Hub.root = root / "hub"
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = functools.partial(case, root, files, f"http://127.0.0.1:{server.server_port}")
        run("all is well", ends_well=True)
        for status, code in ((401, "GatedRepo"), (404, "RepoNotFound"), (500, "")):
            run(f"pretrained {status} {code}", wrong={BASE: fails(status, code)})
            run(f"expert {status} {code}", wrong={EXPERTS["bees"]: fails(status, code)})
        run("expert cut", wrong={EXPERTS["bees"]: cut})
        run("pretrained that hangs", wrong={BASE: lambda hub: time.sleep(60)})
        run("no hub", endpoint="http://127.0.0.1:9")
        run("no hub, all cached", endpoint="http://127.0.0.1:9", cached=True, ends_well=True)
        run("expert broken", expert="here/broken")
        run("expert of another shape", expert="here/wide")
        shape = ["++method.coefficients={init: 0.3}"]
        run("the same under coefficients", expert="here/wide", more=shape)
        for name in ("columns", "cut", "text"):
            run(f"parquet: {name}", file=files[name])
        run("parquet: no labels", file=files["unlabelled"], ends_well=True)
        run("no such split", split="tset")
        server.shutdown()


def case(
    root: Path,
    files: dict[str, str],
    hub: str,
    name: str,
    *,
    wrong: dict[str, Callable[[Hub], None]] | None = None,
    endpoint: str | None = None,
    cached: bool = False,
    expert: str = EXPERTS["bees"],
    file: str | None = None,
    split: str = "test",
    more: list[str] | None = None,
    ends_well: bool = False,
) -> None:
    """Run the command with one thing wrong, and print what came of it."""
    if len(sys.argv) > 1 and name not in sys.argv[1:]:
        return
    Hub.wrong = wrong or {}
    data = {"_target_": "datasets.load_dataset", "path": "parquet", "split": split}
    data |= {"_convert_": "all"}
    pool = {
        "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
        "_recursive_": False,
        "processor": str(root / "processor"),
        "models": {"_pretrained_": BASE, "ants": EXPERTS["ants"], "bees": expert},
        "test_datasets": {
            "ants": data | {"data_files": {"test": files["good"]}, "split": "test"},
            "bees": data | {"data_files": {"test": file or files["good"]}},
        },
    }
    (root / "config/modelpool/here.yaml").write_text(yaml.safe_dump(pool))
    home = root / "all" if cached or name == "all is well" else root / "home"
    shutil.rmtree(root / "home", ignore_errors=True)
    given = ["method=intervmerge", "modelpool=here", "method.steps=2", "method.resume=never"]
    given += [f"path.log_dir={root / 'log'}", *(more or [])]
    started = time.perf_counter()
    done = subprocess.run(
        [COMMAND, "--config-dir", str(root / "config"), *given],
        cwd=root,
        env=os.environ | {"HF_ENDPOINT": endpoint or hub, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    screen = done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if "; allowed: " in line]
    good = done.returncode == 0 if ends_well else len(told) == 1 and "Traceback" not in screen
    print(
        f"{'good' if good else 'BAD'}: {name}: {time.perf_counter() - started:.0f} s, status "
        f"{done.returncode}, {len(screen.splitlines())} lines, "
        f"{screen.count('Traceback')} tracebacks\n    {(told or [''])[0]}"
    )
    if not good:
        print(done.stderr[-1500:])
    if "does not answer" in screen:
        print("    the screen says HF_HUB_OFFLINE=1:", "HF_HUB_OFFLINE=1" in screen)


if __name__ == "__main__":
    main()
