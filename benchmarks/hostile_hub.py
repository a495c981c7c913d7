"""Failures of a hub and of its files: ``python benchmarks/hostile_hub.py [CASE...]``.

A hub is emulated on loopback with tiny random models; one thing is wrong in each case. Each is a
process of its own that enters at the command's ``main``, forked so that it need not import
everything anew. Printed are the lines on its screen, the tracebacks among them, seconds, and the
line that says what is wrong.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from command import fusion_bench

BASE, EXPERTS = "here/clip", {"ants": "here/clip_ants", "bees": "here/clip_bees"}
SHA = "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories from folders; ``wrong`` answers for some, where it returns true."""

    root: Path
    wrong: ClassVar[dict[str, Callable[[Hub], bool]]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        is_api = path.startswith("api/models/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo in self.wrong and self.wrong[repo](self):
            return
        if is_api:
            names = [file.name for file in (self.root / repo).iterdir()]
            about = {"id": repo, "sha": SHA, "siblings": [{"rfilename": n} for n in names]}
            self.send(json.dumps(about | {"private": False, "tags": []}).encode())
        elif (self.root / repo / path.rpartition("/")[2]).is_file():
            self.send((self.root / repo / path.rpartition("/")[2]).read_bytes())
        else:
            self.fail(404, "EntryNotFound")

    def send(self, body: bytes, keep: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:keep])

    def fail(self, status: int, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def fails(status: int, code: str = "") -> Callable[[Hub], bool]:
    return lambda hub: hub.fail(status, code) is None


def cut(hub: Hub) -> bool:
    """A file that ends before its length is reached, however often it is asked for."""
    name = hub.path.rpartition("/")[2]
    if name != "model.safetensors":
        return False
    if "Range" in hub.headers:
        hub.fail(503)
    else:
        body = (hub.root / EXPERTS["bees"] / name).read_bytes()
        hub.send(body, keep=1000)
    return True


def models(root: Path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel

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
    """Parquet files: a good one, one with other columns, a cut one, one that is none."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pictures

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


class Place:
    """A folder with the hub's files, the pool's config, and the hub itself."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("hub", "data", "config/modelpool"):
            (root / name).mkdir(parents=True)
        self.server = self.serve(0)
        # read once, when the libraries are imported
        os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{self.server.server_port}"
        os.environ["HF_HOME"] = str(root / "home")
        from fusion_bench_intervmerge.tinyclip import ensure_pool

        models(root / "hub")
        self.files = pictures(root / "data")
        self.processor = str(ensure_pool() / "pretrained")
        Hub.root = root / "hub"

    def serve(self, port: int) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def case(
        self,
        name: str,
        *,
        wrong: dict[str, Callable[[Hub], bool]] | None = None,
        hub: bool = True,
        cached: bool = False,
        expert: str = EXPERTS["bees"],
        file: str = "good",
        split: str = "test",
        more: list[str] | None = None,
        ends_well: bool = False,
    ) -> None:
        """Run with one thing wrong, and print what came of it."""
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            return
        Hub.wrong = wrong or {}
        data = {"_target_": "datasets.load_dataset", "path": "parquet", "_convert_": "all"}
        pool = {
            "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
            "_recursive_": False,
            "processor": self.processor,
            "models": {"_pretrained_": BASE, "ants": EXPERTS["ants"], "bees": expert},
            "test_datasets": {
                "ants": data | {"data_files": {"test": self.files["good"]}, "split": "test"},
                "bees": data | {"data_files": {"test": self.files[file]}, "split": split},
            },
        }
        (self.root / "config/modelpool/here.yaml").write_text(yaml.safe_dump(pool))
        if not cached:
            shutil.rmtree(self.root / "home", ignore_errors=True)
        if not hub:
            port = self.server.server_port
            self.server.shutdown()
            self.server.server_close()
        started = time.perf_counter()
        status, screen = self.command(*(more or []))
        seconds = time.perf_counter() - started
        if not hub:
            self.server = self.serve(port)
        told = [line for line in screen.splitlines() if "; allowed: " in line]
        good = status == 0 if ends_well else len(told) == 1 and "Traceback" not in screen
        print(
            f"{'good' if good else 'BAD'}: {name}: {seconds:.0f} s, status {status}, "
            f"{len(screen.splitlines())} lines, {screen.count('Traceback')} tracebacks"
            + (", HF_HUB_OFFLINE=1 is said" if "HF_HUB_OFFLINE=1" in screen else "")
            + "".join(f"\n    {line}" for line in told),
            flush=True,
        )
        if not good:
            print(screen[-1500:], flush=True)

    def command(self, *more: str) -> tuple[int, str]:
        """Status and screen of a run."""
        given = ["method=intervmerge", "modelpool=here", "method.steps=2", "method.resume=never"]
        log = f"path.log_dir={self.root / 'log'}"
        return fusion_bench(
            self.root, "--config-dir", str(self.root / "config"), log, *given, *more
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = Place(Path(temporary)).case
        run("all is well", ends_well=True)
        run("no hub, all cached", hub=False, cached=True, ends_well=True)
        run("no hub", hub=False)
        for status, code in ((401, "GatedRepo"), (404, "RepoNotFound"), (500, ""), (503, "")):
            run(f"pretrained {status}", wrong={BASE: fails(status, code)})
            run(f"expert {status}", wrong={EXPERTS["bees"]: fails(status, code)})
        run("expert cut", wrong={EXPERTS["bees"]: cut})
        run("expert broken", expert="here/broken")
        run("expert of another shape", expert="here/wide")
        shape = ["++method.coefficients={init: 0.3}"]
        run("the same under coefficients", expert="here/wide", more=shape)
        run("other columns", file="columns")
        run("cut parquet", file="cut")
        run("parquet that is none", file="text")
        run("no labels", file="unlabelled", ends_well=True)
        run("no such split", split="tset")


if __name__ == "__main__":
    main()
