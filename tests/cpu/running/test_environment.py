"""What a rank's libraries find in the environment, however the rank was started."""

import pytest

from peergrad.config import Config, ParallelConfig, RolloutConfig, ServerMode, ServersConfig
from peergrad.running.environment import conflicts, prepare

OURS = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


def config(tensor=1, **args):
    return Config(
        parallel=ParallelConfig(tensor=tensor),
        rollout=RolloutConfig(servers=ServersConfig(args=args)),
    )


@pytest.mark.parametrize(
    ("args", "on"),
    [
        ({}, ""),
        ({"enable-symm-mem": False, "moe_a2a_backend": "deepep"}, ""),
        ({"enable_symm_mem": True}, "CUMEM NVLS"),
        ({"--enable-nccl-nvls": True}, "NVLS"),
        ({"enable-kv-cache-sharding": True}, "CUMEM"),
        ({"moe_a2a_backend": "deepep_v2"}, "CUMEM"),
    ],
)
def test_nccl_is_told_what_sglang_makes_of_its_options(args, on):
    found: dict[str, str] = {}
    prepare(config(**args), found)
    assert found == OURS | {f"NCCL_{name}_ENABLE": "1" for name in on.split()}
    assert not list(conflicts(config(2, **args), found))


def test_what_the_user_has_set_stays_and_is_said_where_it_may_not_be_meant():
    found = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_NVLS_ENABLE": "1", "NCCL_CUMEM_ENABLE": "0"}
    own = dict(found)
    prepare(config(), found)
    assert found == OURS | own
    assert not list(conflicts(config(), found))  # servers of our own inherit what NCCL is told
    (line,) = conflicts(config(tensor=2), found)
    assert line.startswith("CUDA_DEVICE_MAX_CONNECTIONS=8: before Blackwell, GPUs send beside ")
    (line,) = conflicts(config(**{"enable-symm-mem": True}), found)
    assert line.startswith(
        "NCCL_CUMEM_ENABLE=0: SGLang sets 1 with rollout.servers.args.enable-symm-mem, and NCCL "
    )
    servers = ServersConfig(
        mode=ServerMode.external, urls=["http://a:1"], args={"enable-symm-mem": True}
    )
    external = Config(rollout=RolloutConfig(servers=servers))
    assert not list(conflicts(external, found))  # the probe asks them
