"""Peak arithmetic, memory and bandwidth of GPU types by data sheet; what a CPU computes in."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mllm_audio.config import nearest


@dataclass(frozen=True, kw_only=True)
class GPU:
    """What one GPU does at most; bandwidths between GPUs count one direction."""

    words: tuple[str, ...]  # of the name that its driver reports
    bf16_tflops: float  # dense: data sheets that print sparsity print twice this
    memory_gb: float  # 1e9 bytes
    memory_gb_s: float  # at which that is read
    node_gb_s: float  # to a GPU of the same node: NVLink, else PCIe
    network_gb_s: float  # to other nodes, for each GPU: an assumption about the cluster
    source: str

    @property
    def memory_gib(self) -> float:
        """Memory in units of 2**30 bytes."""
        return self.memory_gb * 1e9 / 2**30


_DGX = "network: NVIDIA DGX {} data sheet, an adapter per GPU"
_NETWORK = "network: assumed, 100 Gb/s per GPU"
GPUS: dict[str, GPU] = {
    "a100_40gb": GPU(
        words=("A100", "40GB"),
        bf16_tflops=312,
        memory_gb=40,
        memory_gb_s=1555,
        node_gb_s=300,
        network_gb_s=25,
        source=f"NVIDIA A100 data sheet; {_DGX.format('A100')}",
    ),
    "a100": GPU(
        words=("A100", "80GB"),
        bf16_tflops=312,
        memory_gb=80,
        memory_gb_s=2039,
        node_gb_s=300,
        network_gb_s=25,
        source=f"NVIDIA A100 data sheet; {_DGX.format('A100')}",
    ),
    "h100": GPU(
        words=("H100",),
        bf16_tflops=989,
        memory_gb=80,
        memory_gb_s=3350,
        node_gb_s=450,
        network_gb_s=50,
        source=f"NVIDIA H100 data sheet, SXM; {_DGX.format('H100')}",
    ),
    "h100_pcie": GPU(
        words=("H100", "PCIE"),
        bf16_tflops=756,
        memory_gb=80,
        memory_gb_s=2000,
        node_gb_s=64,
        network_gb_s=12.5,
        source=f"NVIDIA H100 data sheet, PCIe; {_NETWORK}",
    ),
    "h100_nvl": GPU(
        words=("H100", "NVL"),
        bf16_tflops=835,
        memory_gb=94,
        memory_gb_s=3900,
        node_gb_s=64,
        network_gb_s=12.5,
        source=f"NVIDIA H100 data sheet, NVL, PCIe beyond a pair; {_NETWORK}",
    ),
    "h200": GPU(
        words=("H200",),
        bf16_tflops=989,
        memory_gb=141,
        memory_gb_s=4800,
        node_gb_s=450,
        network_gb_s=50,
        source=f"NVIDIA H200 data sheet, SXM; {_DGX.format('H200')}",
    ),
    "b200": GPU(
        words=("B200",),
        bf16_tflops=2250,
        memory_gb=180,
        memory_gb_s=8000,
        node_gb_s=900,
        network_gb_s=50,
        source=f"NVIDIA HGX B200 data sheet; {_DGX.format('B200')}",
    ),
    "l40s": GPU(
        words=("L40S",),
        bf16_tflops=362,
        memory_gb=48,
        memory_gb_s=864,
        node_gb_s=32,
        network_gb_s=12.5,
        source=f"NVIDIA L40S data sheet, PCIe; {_NETWORK}",
    ),
    "l4": GPU(
        words=("L4",),
        bf16_tflops=121,
        memory_gb=24,
        memory_gb_s=300,
        node_gb_s=32,
        network_gb_s=12.5,
        source=f"NVIDIA L4 data sheet, PCIe; {_NETWORK}",
    ),
}


def get_gpu(name: str) -> GPU:
    """Look a GPU type up.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; {nearest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def find_gpu(device_name: str) -> GPU | None:
    """Find the type of a device by the name its driver reports; None if it is not in the table.

    Whole words are compared, as GH200 is no H200. A slice of a GPU (MIG) is in no data sheet.
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    found = [gpu for gpu in GPUS.values() if words.issuperset(gpu.words)]
    if not found or "MIG" in words:
        return None
    return max(found, key=lambda gpu: len(gpu.words))


def machine_name() -> str:
    """Name system, processor and its number of cores."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return f"{platform.system()} {platform.machine()}, {processor}, {os.cpu_count()} cores"


def has_bf16(device_type: str) -> bool:
    """Tell whether a device multiplies bf16: an x86 CPU without AVX-512 BF16 or AMX emulates it."""
    if device_type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
