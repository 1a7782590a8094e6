"""Arrivals that are read from a file."""

import json

import pytest

from ktransformers.scheduler.workload import WorkloadError, read_trace


def test_trace_files(tmp_path):
    file = tmp_path / "trace.jsonl"
    size = {"prompt": 5, "output": 3}
    lines = [{"seconds": 2.0, "tenant": "b", **size}, {"seconds": 1, "tenant": "a", **size}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert [a.tenant for a in read_trace(file)] == ["a", "b"]
    file.write_text('{"seconds": 1, "what": 2}')
    with pytest.raises(WorkloadError, match="what"):
        read_trace(file)
