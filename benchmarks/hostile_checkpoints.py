"""Hundreds of checkpoints that mean harm, through the doors of the OpenCLIP pool.

    python benchmarks/hostile_checkpoints.py

Each file is read in a process of its own, as an encoder and as a head. It may be refused in one
line or, where it only is odd, be read. Counted are files that ran something, that left something
behind in the process, that ended in another exception (a traceback on the screen), that were
believed though they lie about their tensors, that crashed or hung; and the longest and the largest.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fusion_bench_intervmerge import pickles
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.encoders.openclip import OpenCLIPTower
from fusion_bench_intervmerge.fusion.openclip import checkpoints

LIMIT_S = 60
TRACE = "trace"

CALLS = """
    os.system posix.system subprocess.call subprocess.Popen subprocess.check_output pty.spawn
    builtins.eval builtins.exec builtins.compile builtins.__import__ builtins.getattr
    builtins.setattr builtins.open builtins.print builtins.globals _io.open io.open os.popen
    os.remove shutil.rmtree importlib.import_module runpy.run_path runpy.run_module code.interact
    pickle.loads pickle.load torch.load torch.hub.load torch.jit.load numpy.load ctypes.CDLL
    operator.attrgetter operator.methodcaller functools.partial types.FunctionType types.CodeType
    copyreg._reconstructor copyreg.add_extension socket.socket logging.config.listen
    sys.settrace webbrowser.open torch.Tensor torch.nn.Module torch.serialization.add_safe_globals
""".split()  # noqa: SIM905


# -- pickles, instruction by instruction -----------------------------------------------------------


def called(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def called_by_stack(name: str) -> bytes:
    return b"".join(text(part) for part in (name.rpartition(".")[0], name.rpartition(".")[2])) + (
        pickle.STACK_GLOBAL
    )


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.LONG1 + bytes([9]) + value.to_bytes(9, "little", signed=True)


def sequence(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    return (
        b"("
        + text("storage")
        + called(f"torch.{kind}")
        + text(key)
        + text("cpu")
        + (number(numel) + b"tQ")
    )


def legacy_storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    return storage(key, numel, kind)[:-2] + b"NtQ"


def tensor(
    stored: bytes,
    size: bytes = sequence(2, 2),
    stride: bytes = sequence(2, 1),
    offset: bytes = number(0),
    more: bytes = b"",
) -> bytes:
    hooks = called("collections.OrderedDict") + b")R"
    arguments = b"(" + stored + offset + size + stride + b"\x89" + hooks + more + b"t"
    return called("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def in_dict(*values: bytes) -> bytes:
    items = b"".join(text("weight" if n == 0 else f"w{n}") + v for n, v in enumerate(values))
    return b"}(" + items + b"u"


def as_zip(body: bytes, records: dict[str, bytes] | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", options.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for name, content in ({"data/0": struct.pack("<4f", *range(4))} | (records or {})).items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def as_legacy(body: bytes, keys: tuple[str, ...] = ("0",), numel: int = 4) -> bytes:
    start = [torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}]
    head = b"".join(pickle.dumps(value, protocol=2) for value in start)
    tail = pickle.dumps(list(keys), protocol=2)
    stored = b"".join(struct.pack("<q", numel) + struct.pack("<4f", *range(4)) for _ in keys)
    return head + b"\x80\x02" + body + b"." + tail + stored


def as_plain(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def as_nested(body: bytes) -> bytes:
    """In the bytes of a storage in a plain pickle."""
    inner = as_legacy(body)
    stored = pickle.BINBYTES + struct.pack("<I", len(inner)) + inner
    return as_plain(called("torch.storage._load_from_bytes") + stored + b"\x85R")


def nested_storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    inner = as_legacy(legacy_storage(key, numel, kind))
    stored = pickle.BINBYTES + struct.pack("<I", len(inner)) + inner
    return called("torch.storage._load_from_bytes") + stored + b"\x85R"


FORMATS = {"zip": as_zip, "legacy": as_legacy, "plain": as_plain, "nested": as_nested}
STORAGES = {"zip": storage, "legacy": legacy_storage, "plain": nested_storage}


# -- the files -------------------------------------------------------------------------------------


def files(trace: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file; ``lie`` in a name says that it must not be believed."""
    for kind in (calls, states, lies, structures, archives, headers, damages):
        for name, content in kind(trace):
            yield f"{kind.__name__}: {name}", content


def calls(trace: str) -> Iterator[tuple[str, bytes]]:
    command = text(f"touch {trace}")
    for name in CALLS:
        for form, wrap in FORMATS.items():
            yield f"{name}, {form}", wrap(in_dict(called(name) + command + b"\x85R"))
        yield f"{name}, by stack", as_plain(called_by_stack(name) + command + b"\x85R")
    for form, wrap in FORMATS.items():
        module = b"ios\nsystem\n"
        for way, body in {
            "INST": b"(" + command + module,
            "OBJ": b"(" + called("os.system") + command + b"o",
            "NEWOBJ": called("os.system") + command + b"\x85\x81",
            "NEWOBJ_EX": called("os.system") + command + b"\x85}\x92",
            "EXT1": b"\x82\x01" + command + b"\x85R",
            "EXT4": b"\x84\x01\x00\x00\x00" + command + b"\x85R",
            "PERSID": b"Pos.system\n",
            "NEXT_BUFFER": b"\x97",
            "a dotted name": b"cos\nsystem.__call__\n" + command + b"\x85R",
            "a name's attribute": called("collections.OrderedDict.fromkeys") + b"]\x85R",
            "a call of a string": command + command + b"\x85R",
            "a call of a tensor's class": called("torch.FloatStorage") + number(10**9) + b"\x85R",
        }.items():
            yield f"{way}, {form}", wrap(body)


def states(trace: str) -> Iterator[tuple[str, bytes]]:
    """Attributes for everything that a file may name, and for what comes of calling it."""
    state = (
        b"}("
        + b"".join(
            text(name) + value
            for name, value in {
                "__setstate__": called("torch._utils._rebuild_parameter"),
                "__init__": called("torch._utils._rebuild_parameter"),
                "__defaults__": b"}" + text("neg") + b"\x88s\x85",
                "__code__": called("builtins.set"),
                "__class__": called("builtins.set"),
                "__dict__": b"}",
                "left": number(1),
            }.items()
        )
        + b"u"
    )
    names = sorted([*pickles._CALLS, *pickles._STORAGES, *checkpoints._NAMES])
    for name in names:
        for form, wrap in (("zip", as_zip), ("plain", as_plain)):
            yield f"of {name}, {form}", wrap(called(name) + state + b"b")
        yield f"in slots of {name}", as_plain(called(name) + b"N" + state + b"\x86b")
        yield f"of an object of {name}", as_legacy(called(name) + b")\x81" + state + b"b")
    for form, make in STORAGES.items():
        made = tensor(make())
        yield f"of a tensor, {form}", FORMATS[form](made + state + b"b")
        yield f"of a storage, {form}", FORMATS[form](make() + state + b"b")
    for value, kind in ((b"}", "a dict"), (b"]", "a list"), (text("x"), "a string")):
        yield f"of {kind}", as_plain(value + state + b"b")


def lies(trace: str) -> Iterator[tuple[str, bytes]]:
    big, huge = 900_000, 2**62
    for form, make in STORAGES.items():
        wrap = FORMATS[form]
        for name, body in {
            "a storage of 900,000 numbers on four": tensor(
                make(numel=big), sequence(big), sequence(1)
            ),
            "a storage of 2^62 numbers": tensor(make(numel=huge), sequence(2, 2)),
            "a storage of a negative size": tensor(make(numel=-4)),
            "a storage of another type": tensor(make(kind="DoubleStorage")),
            "a size of 900,000": tensor(make(), sequence(big, 1), sequence(1, 1)),
            "a size of 2^62": tensor(make(), sequence(huge, 4), sequence(1, 1)),
            "a negative size": tensor(make(), sequence(-2, 2)),
            "an offset beyond the storage": tensor(make(), offset=number(3)),
            "an offset of 2^62": tensor(make(), offset=number(huge)),
            "a negative offset": tensor(make(), offset=number(-1)),
            "a stride beyond the storage": tensor(make(), stride=sequence(big, 1)),
            "a negative stride": tensor(make(), stride=sequence(-2, 1)),
            "an expanded view of 4 GB": tensor(make(), sequence(10**6, 1000), sequence(0, 0)),
            "an expanded view of 400 bytes": tensor(make(), sequence(10, 10), sequence(0, 0)),
            "fewer strides than sizes": tensor(make(), stride=sequence(1)),
            "a size that is no number": tensor(make(), size=b"(" + text("2") * 2 + b"t"),
            "a size that is True": tensor(make(), size=b"(\x88\x88t"),
            "a size that is no tuple": tensor(make(), size=number(4)),
            "a negated view": tensor(make(), more=b"}" + text("neg") + b"\x88s"),
            "no storage": tensor(number(1)),
            "a storage that is not there": tensor(make(key="7")),
            "a storage elsewhere": tensor(make(key="../../../../etc/passwd")),
        }.items():
            if name == "a storage that is not there" and form == "plain":
                continue  # it is not: the key of a nested storage is its own
            if name == "a storage elsewhere" and form == "plain":
                continue
            yield f"lie: {name}, {form}", wrap(in_dict(body))
    many = [tensor(storage("1", big), sequence(big), sequence(1)) for _ in range(1000)]
    content = {"data/1": bytes(4 * big)}
    less = tensor(storage("1", big), sequence(-1, 2**40), sequence(1, 1))
    yield "lie: as many, and one of less than nothing", as_zip(in_dict(*many, less), content)
    yield "lie: 1,000 tensors of one storage of 4 MB", as_zip(in_dict(*many), content)


def structures(trace: str) -> Iterator[tuple[str, bytes]]:
    huge = struct.pack("<Q", 2**40)
    for name, body in {
        "a text of a terabyte": b"\x8d" + huge + b"x",
        "bytes of a terabyte": b"\x8e" + huge + b"x",
        "a bytearray of 8 GB": b"\x96" + struct.pack("<Q", 2**33) + b"x",
        "a frame of a terabyte": b"\x95" + huge + b"N",
        "a number of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
        "a long decimal": b"I" + b"9" * 10**6 + b"\n",
        "a memo of 2^32": b"Nr\xff\xff\xff\xff",
        "a memo that is not there": b"h\x07",
        "nothing on the stack": b"0" * 50,
        "marks without end": b"(" * 200_000,
        "a deep tuple as a key": b"}" + b")" + b"\x85" * 200_000 + b"Ns",
        "a deep tuple in a set": b"\x8f(" + b")" + b"\x85" * 200_000 + b"\x90",
        "a deep list": b"]" * 100_000 + b"a" * 99_999,
        "items of a tuple": b")(" + text("a") + b"Nu",
        "items of a class": called("collections.OrderedDict") + b"(" + text("a") + b"Nu",
        "a list appended to a class": called("builtins.set") + b"(Ne",
        "a cycle": b"]q\x01h\x01a",
        "unknown instructions": b"\xff\xfe\xfd",
        "protocol 255": b"\x80\xff",
    }.items():
        for form in ("plain", "zip", "legacy"):
            yield f"{name}, {form}", FORMATS[form](body)
    module, modules = called("torch.nn.modules.container.Sequential") + b")\x81", text("_modules")
    yield (
        "a module in itself",
        as_plain(module + b"q\x01}" + modules + b"}" + text("a") + b"h\x01ssb"),
    )
    body = module + b"q\x00"
    for depth in range(1, 60):  # each holds the one before it twice: 2^60 ways to the first
        inside = b"}(" + text("a") + b"h" + bytes([depth - 1]) + text("b") + b"h"
        body += module + b"}" + modules + inside + bytes([depth - 1]) + b"usbq" + bytes([depth])
    yield "2^60 modules", as_plain(body)
    deep = module + b"q\x00"
    for depth in range(1, 3000):
        last, here = (struct.pack("<I", n) for n in (depth - 1, depth))
        inside = b"}" + text("a") + b"j" + last + b"s"
        deep += module + b"}" + modules + inside + b"sbr" + here
    yield "3,000 modules in one another", as_plain(deep)
    for value in (b"N", b"]", number(7), text("x"), b")", b"\x8f"):
        state = (
            b"}("
            + b"".join(
                text(name) + value for name in ("_modules", "_parameters", "_buffers", "normalize")
            )
            + b"u"
        )
        yield f"a module of {value!r}", as_plain(module + state + b"b")
        yield f"nothing but {value!r}", as_plain(value)


def archives(trace: str) -> Iterator[tuple[str, bytes]]:
    good = in_dict(tensor(storage()))
    yield "compressed", as_zip(good, compression=zipfile.ZIP_DEFLATED)
    bomb = as_zip(in_dict(tensor(storage(numel=2**28), sequence(2**14, 2**14), sequence(2**14, 1))))
    yield "lie: a size in the pickle alone", bomb
    yield (
        "a bomb",
        as_zip(
            in_dict(tensor(storage("1", 2**26), sequence(2**13, 2**13), sequence(2**13, 1))),
            {"data/1": bytes(2**28)},
            compression=zipfile.ZIP_DEFLATED,
        ),
    )
    for order in ("big", "middle", ""):
        yield f"byte order {order!r}", as_zip(good, {"byteorder": order.encode()})
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("code/model.py", f"import os; os.system('touch {trace}')")
        archive.writestr("constants.pkl", b"\x80\x02).")
    yield "a TorchScript archive", stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for folder in ("a", "b"):
            archive.writestr(f"{folder}/data.pkl", b"\x80\x02" + good + b".")
    yield "two pickles", stream.getvalue()
    sound = as_zip(good)
    central = sound.rfind(b"PK\x01\x02")
    for name, at, value in (
        ("a header beyond the file", 42, 2**31),
        ("an encrypted record", 8, 1),
        ("an unknown compression", 10, 99),
    ):
        changed = bytearray(sound)
        width = 4 if at == 42 else 2
        changed[central + at : central + at + width] = value.to_bytes(width, "little")
        yield f"lie: {name}", bytes(changed)
    # the numbers that are asked for are there
    yield "a record of 2 GB", sound[: central + 24] + b"\0\0\0\x80" + sound[central + 28 :]


def sound_safetensors(metadata: dict[str, str], weights: dict[str, Any] | None = None) -> bytes:
    return save(weights or sound_weights(), metadata)


@cache
def sound_weights() -> dict[str, Any]:
    """An encoder of the sizes of ``SPEC``, and a head, too."""
    torch.manual_seed(0)
    tower = OpenCLIPTower.from_spec(SPEC)
    named = {f"model.{name}": value for name, value in tower.weights().items()}
    return named | {"weight": torch.ones(3, 4)}


SPEC: dict[str, Any] = {
    "family": "openclip",
    "image_size": 32,
    "patch_size": 16,
    "width": 64,
    "layers": 1,
    "heads": 1,
    "mlp_ratio": 4.0,
    "output_dim": 16,
    "quick_gelu": True,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def headers(trace: str) -> Iterator[tuple[str, bytes]]:
    """Odd metadata and lying headers of safetensors files."""
    for told in ("null", "[]", "7", '"x"', "{}", "", "{", "NaN", "[[[" * 2000, "true"):
        yield f"safetensors lie: spec {told[:9]}", sound_safetensors({"spec": told})
    values = (0, -1, 10**30, 2**62, 1e308, None, "x", [], {}, True, 3.5)
    for key in SPEC:
        for value in values:
            if SPEC[key] == value:
                continue
            spec = json.dumps(SPEC | {key: value})
            yield f"safetensors lie: spec.{key} {value!r}", sound_safetensors({"spec": spec})
    for key in ("mean", "std"):
        for value in ([0.5], [0.5] * 4, ["x"] * 3, [float("nan")] * 3, [float("inf")] * 3):
            spec = json.dumps(SPEC | {key: value})
            yield f"safetensors lie: spec.{key} {value}", sound_safetensors({"spec": spec})
    for told in ("maybe", "", "null", "[]", "1", "[" * 5000, "NaN"):
        head = sound_safetensors({"normalize": told}, {"weight": torch.ones(3, 4)})
        yield f"safetensors lie: normalize {told[:9]}", head
    for name, weights in {
        "an empty head": {"weight": torch.ones(0, 4)},
        "a head of whole numbers": {"weight": torch.ones(3, 4, dtype=torch.int64)},
        "a bias of another size": {"weight": torch.ones(3, 4), "bias": torch.ones(9)},
        "a bias that is a matrix": {"weight": torch.ones(3, 4), "bias": torch.ones(3, 4)},
        "one tensor": {"model.visual.conv1.weight": torch.ones(3)},
        "an empty encoder": {"model.visual.conv1.weight": torch.ones(0, 3, 8, 8)},
        "five hundred blocks": {
            f"model.visual.transformer.resblocks.{n}.x": torch.ones(1) for n in range(500)
        }
        | {
            "model.visual.conv1.weight": torch.ones(64, 3, 16, 16),
            "model.visual.positional_embedding": torch.ones(5, 64),
            "model.visual.proj": torch.ones(64, 16),
            "model.visual.transformer.resblocks.0.mlp.c_fc.weight": torch.ones(256, 64),
        },
    }.items():
        yield f"safetensors lie: {name}", sound_safetensors({}, weights)
    entry = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
    for name, change in {
        "a shape of 2^60": {"shape": [2**60, 4]},
        "a negative shape": {"shape": [-3, 4]},
        "an unknown type": {"dtype": "F99"},
        "offsets beyond the file": {"data_offsets": [0, 4800]},
        "offsets backwards": {"data_offsets": [48, 0]},
        "a shape without entries": {"shape": [10**15, 0], "data_offsets": [0, 0]},
    }.items():
        header = json.dumps({"weight": entry | change}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(48)
        yield f"safetensors lie: {name}", content
    for size in (0, 7, 2**31, 2**63):
        yield f"safetensors lie: a header of {size} bytes", struct.pack("<Q", size) + b"{}"


def damages(trace: str) -> Iterator[tuple[str, bytes]]:
    """A sound checkpoint, cut short or with flipped bits."""
    weight = OrderedDict(weight=torch.arange(12.0).view(3, 4), bias=torch.ones(3))
    zipped, legacy, plain = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(weight, zipped)
    torch.save(weight, legacy, _use_new_zipfile_serialization=False)
    pickle.dump(weight, plain)
    sound = {"zip": zipped, "legacy": legacy, "plain": plain}
    for form, stream in sound.items():
        content = stream.getvalue()
        for part in range(20):
            yield f"cut at {part}/20, {form}", content[: len(content) * part // 20]
        for seed in range(30):
            chosen, flipped = random.Random(seed), bytearray(content)
            flipped[chosen.randrange(len(flipped))] ^= 1 << chosen.randrange(8)
            yield f"bit {seed}, {form}", bytes(flipped)


# -- reading them ----------------------------------------------------------------------------------


def fingerprint() -> str:
    """Everything of this process that a pickle could get at by the names that it may use."""
    found = []
    for name in sorted([*pickles._CALLS, *pickles._STORAGES, *checkpoints._NAMES, *CALLS]):
        module, _, attribute = name.rpartition(".")
        try:
            thing: Any = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError):
            continue
        own = {k: repr(v) for k, v in sorted(getattr(thing, "__dict__", {}).items())}
        code = getattr(thing, "__code__", None)
        found.append((name, own, repr(getattr(thing, "__defaults__", None)), repr(code)))
    for thing in (pickles, pickles.Name, pickles.StandIn, pickles._Reader, checkpoints):
        found.append((str(thing), {k: repr(v) for k, v in sorted(vars(thing).items())}, "", ""))
    stream = io.BytesIO()
    torch.save(torch.arange(3.0), stream)
    stream.seek(0)
    found.append(("torch.load", {}, repr(torch.load(stream)), ""))
    found.append(("safe globals", {}, repr(sorted(map(repr, _safe_globals()))), ""))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _safe_globals() -> list[Any]:
    return torch.serialization.get_safe_globals()


def attempt(path: Path, trace: Path, before: str) -> dict[str, Any]:
    """What reading a file comes to: ``outcome`` and what else there is to say."""
    outcomes = []
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (checkpoints.load_encoder, checkpoints.load_head):
        try:
            load(path)
            outcomes.append("read")
        except ConfigError as error:
            outcomes.append("refused" if "\n" not in str(error) else "more than one line")
        except BaseException as error:
            outcomes.append(f"traceback: {type(error).__name__}: {str(error)[:80]}")
    seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {
        "outcomes": outcomes,
        "executed": trace.exists(),
        "trace": fingerprint() != before,
        "seconds": seconds,
        "grown_mb": grown / 1024,
    }


def in_a_process_of_its_own(path: Path, trace: Path, before: str) -> dict[str, Any]:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        result = attempt(path, trace, before)
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as stream:
        said = stream.read()
    status = os.waitpid(child, 0)[1]
    if status or not said:
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else status
        return {
            "outcomes": [f"died of signal {killed}"],
            "executed": trace.exists(),
            "trace": False,
        }
    return json.loads(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="a line for each file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    longest, largest = (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSION_BENCH_INTERVMERGE_CACHE"] = str(Path(folder) / "cache")
        trace = Path(folder) / TRACE
        fingerprint()  # the first look imports what it looks at
        before = fingerprint()
        for name, content in files(str(trace)):
            kind = "safetensors" if "safetensors" in name else "pt"
            path = Path(folder) / f"checkpoint.{kind}"
            path.write_bytes(content)
            result = in_a_process_of_its_own(path, trace, before)
            trace.unlink(missing_ok=True)
            counts["files"] += 1
            counts["executed something"] += result["executed"]
            counts["left a trace"] += result["trace"]
            other = [o for o in result["outcomes"] if o not in ("read", "refused")]
            counts["another exception, a crash or a hang"] += bool(other)
            # a lie about an encoder may well be in the file of a sound head
            believed = " lie: " in f" {name}" and result["outcomes"][-1] == "read"
            if "spec" in name:
                believed = result["outcomes"][0] == "read"
            counts["believed though it lies"] += believed
            counts["refused in one line"] += result["outcomes"].count("refused") == 2
            longest = max(longest, (result.get("seconds", 0.0), name))
            largest = max(largest, (result.get("grown_mb", 0.0), name))
            bad = result["executed"] or result["trace"] or other or believed
            if bad or options.verbose:
                print(f"{name}: {', '.join(result['outcomes'])}")
    for what, count in counts.items():
        print(f"{what}: {count}")
    print(f"longest: {longest[0]:.2f} s of processor time ({longest[1]})")
    print(f"largest: {largest[0]:.0f} MB ({largest[1]})")
    failed = sum(counts[what] for what in counts if what not in ("files", "refused in one line"))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
