"""train.py with the learner sharded on CPUs. Accelerate shards on GPUs alone, and takes DDP on CPUs
without a word, though PyTorch can shard there. So this tells it that it has GPUs.

    ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py --engine …
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from accelerate import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__


def begin_as_on_gpus(state, *args, **more) -> None:
    begin(state, *args, **more)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_on_gpus
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
