"""Profiles: found by name or path, refused with the field's name, honest about what was measured."""

import copy
import json
import pickle
import subprocess
import sys
from importlib import resources
from typing import get_args

import pytest
from pydantic import BaseModel

from colrow.cost_models.errors import HardwareError
from colrow.cost_models.hardware import Hardware, hardware_names, load_hardware, parse_hardware


@pytest.fixture
def content() -> dict:
    """A valid profile to damage."""
    return json.loads((resources.files("colrow.cost_models") / "profiles" / "h100-sxm.json").read_text("utf-8"))


def refusal(content: object) -> str:
    with pytest.raises(HardwareError) as caught:
        parse_hardware(json.dumps(content), where="mine.json")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_contracted_profiles_exist() -> None:
    assert {"h100-sxm", "a100-sxm", "l40s-pcie", "gloo-cpu"} <= set(hardware_names())


@pytest.mark.parametrize("name", hardware_names())
def test_profiles_name_their_source_licence_and_date(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name and hardware.licence in ("Apache-2.0", "MIT") and hardware.date >= "2024-01-01"
    if hardware.basis == "structural":
        assert "structural" in hardware.description.lower() and "no table" in hardware.source
    else:
        assert hardware.commit or hardware.source.startswith("measured")
    assert hardware.compute.source and hardware.memory.source and hardware.launch_source


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(HardwareError) as caught:
        load_hardware("h100")
    assert "'h100'" in str(caught.value) and all(name in str(caught.value) for name in hardware_names())


def test_a_path_is_read_and_a_missing_one_is_named(tmp_path, content) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**content, "name": "mine"}))
    assert load_hardware(str(path)).name == "mine"
    with pytest.raises(HardwareError, match="absent.json: cannot read"):
        load_hardware(str(tmp_path / "absent.json"))
    with pytest.raises(HardwareError, match="cannot read"):
        load_hardware(f"{tmp_path}/")


def test_text_that_is_not_a_profile_is_refused() -> None:
    for text, complaint in (("{", "not valid JSON"), ("[]", "not a hardware profile"), ("{}", "schema")):
        with pytest.raises(HardwareError, match=complaint):
            parse_hardware(text, where="mine.json")


@pytest.mark.parametrize("version", ["colrow.hardware/0", "colrow.hardware/2", None, 1])
def test_an_unknown_version_is_refused(content, version) -> None:
    content["schema"] = version
    assert "mine.json: schema: unknown version" in refusal(content)


@pytest.mark.parametrize(
    "field",
    ["name", "licence", "source", "memory_gb", "ranks_per_node", "collectives", "inter_node", "compute", "memory",
     "launch_overhead_s"],
)  # fmt: skip
def test_a_missing_field_is_named(content, field) -> None:
    del content[field]
    assert f"mine.json: {field}: Field required" in refusal(content)


def test_a_missing_kind_is_named(content) -> None:
    del content["collectives"]["broadcast"]
    assert "collectives.broadcast" in refusal(content)


def test_an_unknown_field_is_named(content) -> None:
    content["gpus"] = 8
    assert "mine.json: gpus" in refusal(content)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("collectives", "all_reduce", "groups", 0, "latency_s"), -1e-6),
        (("collectives", "all_reduce", "groups", 0, "latency_s"), 6.2),  # microseconds
        (("collectives", "all_gather", "groups", 2, "segments", 1, "s_per_byte"), -1e-12),
        (("collectives", "all_gather", "groups", 2, "segments", 1, "s_per_byte"), 3.1e-6),  # us per byte
        (("collectives", "broadcast", "groups", 0, "size"), 1),
        (("collectives", "all_reduce", "groups", 0, "basis"), "guessed"),
        (("memory_gb",), 85899345920),  # bytes
        (("memory_gb",), "80"),
        (("memory", "bandwidth_bytes_per_s"), 3350.0),  # GB/s
        (("memory", "efficiency"), 88),  # percent
        (("compute", "peak_flops_per_s", "bfloat16"), 989.4),  # TFLOPS
        (("launch_overhead_s",), 2.45),  # microseconds
        (("launch_overhead_s",), float("nan")),
        (("inter_node", "latency_s"), float("inf")),
        (("ranks_per_node",), 8.5),
        (("date",), "yesterday"),
        (("licence",), ""),
        (("link", "bytes_per_s_per_rank"), 450.0),  # GB/s
        (("link", "topology"), "nvlink"),
        (("inter_node", "network"), "ethernet"),
        (("eager_dispatch_s",), 20.6),  # microseconds
        (("eager_collective_s",), -1e-6),
        (("compute", "units"), 0),
        (("compute", "matmul_start_s"), 0.64),  # microseconds
        (("collectives", "all_reduce", "alternatives", 0, "name"), "nccl"),
        (("collectives", "all_reduce", "alternatives", 0, "licence"), ""),
        (("collectives", "all_reduce", "alternatives", 1, "groups", 0, "latency_s"), 20.6),
        (("collectives", "all_reduce", "groups", 0, "left_out_median_rel_error"), -0.1),
    ],
)
def test_a_negative_value_or_another_unit_is_named(content, path, value) -> None:
    *parents, last = path
    holder = content
    for part in parents:
        holder = holder[part]
    holder[last] = value
    assert "mine.json: " + ".".join(map(str, path)) + ": " in refusal(content)


@pytest.mark.parametrize("field", ["peak_flops_per_s", "efficiency"])
def test_a_misspelt_dtype_is_named(content, field) -> None:
    content["compute"][field]["bfloat61"] = 0.5e12 if field == "peak_flops_per_s" else 0.5
    assert f"{field}.bfloat61 names no torch dtype" in refusal(content)


def test_a_unit_in_the_field_name_is_named_on_both_sides(content) -> None:
    group = content["collectives"]["all_reduce"]["groups"][0]
    group["latency_us"] = group.pop("latency_s") * 1e6
    message = refusal(content)
    assert "groups.0.latency_s: Field required" in message and "groups.0.latency_us" in message


@pytest.mark.parametrize("field", ["software", "source", "commit", "licence", "date", "groups"])
def test_an_alternative_without_a_field_is_refused_by_its_name(content, field) -> None:
    del content["collectives"]["all_reduce"]["alternatives"][0][field]
    assert f"mine.json: collectives.all_reduce.alternatives.0.{field}: Field required" in refusal(content)


def test_an_implementation_twice_is_refused(content) -> None:
    alternatives = content["collectives"]["all_reduce"]["alternatives"]
    alternatives[1]["name"] = alternatives[0]["name"]
    assert "alternatives.name must be distinct" in refusal(content)


def test_fields_added_since_version_1_may_be_missing(content) -> None:
    for part, field in (
        (content, "link"),
        (content, "eager_dispatch_s"),
        (content, "eager_collective_s"),
        (content["compute"], "units"),
        (content["compute"], "matmul_start_s"),
        (content["inter_node"], "network"),
        (content["collectives"]["all_reduce"], "alternatives"),
        (content["collectives"]["all_reduce"]["groups"][0], "left_out_median_rel_error"),
    ):
        del part[field]
    hardware = parse_hardware(json.dumps(content), where="mine.json")
    assert hardware.implementations("all_reduce") == ["library"] and hardware.compute.units == 1


UNITS = ("_s", "_bytes", "_s_per_byte", "_bytes_per_s", "_bytes_per_s_per_rank", "_flops_per_s", "_gb", "_rel_error")
COUNTS = {"size", "nodes", "ranks_per_node", "units", "efficiency"}


def test_every_number_in_a_profile_names_its_unit() -> None:
    parts, seen = [Hardware], set()
    numbers = []
    for part in parts:
        for name, field in part.model_fields.items():
            for inner in _types(field.annotation):
                if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                    seen.add(inner)
                    parts.append(inner)
                elif inner in (int, float):
                    numbers.append(name)
    assert {"latency_s", "from_bytes", "s_per_byte", "peak_flops_per_s", "memory_gb"} <= set(numbers)
    assert [name for name in numbers if not f"_{name}".endswith(UNITS) and name not in COUNTS] == []


def _types(annotation: object) -> list[object]:
    inside = [inner for argument in get_args(annotation) for inner in _types(argument)]
    return inside or [annotation]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda group: group["segments"].reverse(), "from_bytes must start at 0 and ascend"),
        (lambda group: group["segments"][0].update(from_bytes=1), "from_bytes must start at 0 and ascend"),
        (lambda group: group.update(min_bytes=2**40), "min_bytes must not exceed max_bytes"),
        (lambda group: group.update(segments=[]), "segments"),
        (lambda group: group.update(segments=group["segments"] * 2), "segments"),
    ],
)
def test_incoherent_curves_are_refused(content, damage, complaint) -> None:
    damage(content["collectives"]["all_reduce"]["groups"][1])
    message = refusal(content)
    assert "collectives.all_reduce.groups.1" in message and complaint in message


def test_group_sizes_in_disorder_and_a_missing_float32_are_refused(content) -> None:
    damaged = copy.deepcopy(content)
    damaged["collectives"]["all_reduce"]["groups"].reverse()
    assert "groups.size must ascend" in refusal(damaged)
    del content["compute"]["efficiency"]["float32"]
    assert "efficiency must name float32" in refusal(content)


def test_only_measured_kinds_sizes_and_ranges_are_within() -> None:
    hardware = load_hardware("h100-sxm")
    assert hardware.predicts_within("all_reduce", 512, 8) and hardware.predicts_within("all_reduce", 2**29, 8)
    assert not hardware.predicts_within("all_reduce", 511, 8)
    assert not hardware.predicts_within("all_reduce", 2**29 + 1, 8)
    assert not any(hardware.predicts_within("all_reduce", 2**20, size) for size in (3, 5, 6, 7, 9, 16))
    assert not hardware.predicts_within("broadcast", 2**20, 8)  # structural
    assert hardware.predicts_within("all_to_all", 2**20, 8)
    assert hardware.predicts_within("broadcast", 0, 1)
    gloo = load_hardware("gloo-cpu")
    assert gloo.predicts_within("broadcast", 2**20, 2) and not gloo.predicts_within("all_reduce", 2**20, 4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("all_reduce_mean", 8, 2), "unknown collective"),
        (("all_reduce_mean", 8, 1), "unknown collective"),
        (("all_reduce", -1, 2), "cannot be negative"),
        (("all_reduce", 8, 0), "not a group size"),
        (("all_reduce", 8, -2), "not a group size"),
    ],
)
def test_wrong_use_is_refused(arguments, complaint) -> None:
    with pytest.raises(HardwareError, match=complaint):
        load_hardware("h100-sxm").collective_s(*arguments)


def test_a_group_beyond_the_node_needs_a_link_between_nodes() -> None:
    with pytest.raises(HardwareError, match="larger than a node"):
        load_hardware("gloo-cpu").collective_s("all_reduce", 1024, 16)


def test_a_size_beyond_the_curves_is_structural_or_refused_never_extrapolated(content) -> None:
    del content["collectives"]["all_reduce"]["groups"][-1]
    linked = parse_hardware(json.dumps(content), where="mine.json")
    prediction = linked.predict("all_reduce", 1024, 8)
    assert prediction.basis == "structural" and "from the links" in prediction.finding
    del content["link"]
    hardware = parse_hardware(json.dumps(content), where="mine.json")
    with pytest.raises(HardwareError, match="no all_reduce curve for this group size; got 8, need 2 to 4"):
        hardware.collective_s("all_reduce", 1024, 8)


def test_profiles_are_immutable_and_survive_pickling_after_use() -> None:
    hardware = load_hardware("h100-sxm")
    expected = hardware.collective_s("all_reduce", 2**20, 6)
    with pytest.raises(ValueError, match="frozen"):
        hardware.memory_gb = 1.0
    for twin in (pickle.loads(pickle.dumps(hardware)), copy.deepcopy(hardware)):
        assert twin == hardware and twin.collective_s("all_reduce", 2**20, 6) == expected


def test_reading_a_profile_imports_neither_torch_nor_scipy() -> None:
    code = (
        "import sys; from colrow.cost_models import compute, memory;"
        "from colrow.cost_models.hardware import load_hardware;"
        "load_hardware('h100-sxm').collective_s('all_reduce', 1024, 6);"
        "print([name for name in ('torch', 'scipy', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
