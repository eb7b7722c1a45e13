"""A row of record for the tests of the benchmark."""

from turnout.bench.records import Row


def row(**values):
    base = {
        "commit": "abc",
        "device": "NVIDIA H100 80GB HBM3",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "shape": "qwen3-30b",
        "tokens": 16384,
        "mode": "lora16",
        "routing": "uniform",
        "recompute": "none",
        "router": "given",
        "backend": "triton",
        "provider": "turnout",
        "ms": 6.0,
        "tflops": 400.0,
        "dense_tflops": 750.0,
        "saved_mb": 456.0,
        "peak_mb": 900.0,
        "rel_err": 4e-3,
        "config_source": "analytic",
    }
    return Row(**base | values)
