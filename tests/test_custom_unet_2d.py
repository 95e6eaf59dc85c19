"""CustomUNet2DModel against diffusers' UNet2DModel: the same names, outputs and gradients, and one-line errors."""

import inspect
import itertools

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DModel

from custom_unet import CustomUNet2DModel

PLAIN_DOWN, PLAIN_UP = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
ATTN_DOWN, ATTN_UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
ALL_ATTN = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
RESNET_DOWN, RESNET_UP = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
NCSNPP = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 2**0.5,
    "attention_head_dim": None,
}
DDPM = {"norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0}
DDPM |= {"attention_head_dim": None}

# Covers every option at least once; options not listed come from `tiny`.
CONFIGS = {
    "plain": {"down_block_types": PLAIN_DOWN, "up_block_types": PLAIN_UP, "add_attention": False, "act_fn": "relu"},
    "attention": {},
    "attention everywhere": {**ALL_ATTN, "act_fn": "gelu"},
    "heads narrower than the level": {**ALL_ATTN, "attention_head_dim": 3},
    "resnet blocks": {"down_block_types": RESNET_DOWN, "up_block_types": RESNET_UP},
    "resnet resampling": {**ALL_ATTN, "downsample_type": "resnet", "upsample_type": "resnet", "norm_eps": 1e-3},
    "NCSN++": NCSNPP,
    "NCSN++ scale_shift": {**NCSNPP, "resnet_time_scale_shift": "scale_shift", "add_attention": False},
    "NCSN++ fixed groups": {**NCSNPP, "norm_num_groups": 8, "time_embedding_type": "positional", "sample_size": 12},
    "NCSN++ attention everywhere": {
        **NCSNPP,
        "block_out_channels": (32, 64),
        "down_block_types": ("AttnSkipDownBlock2D",) * 2,
        "up_block_types": ("AttnSkipUpBlock2D",) * 2,
        "dropout": 0.3,
        "attention_head_dim": 16,
    },
    "mixed skip blocks": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("SkipDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
    },
    "no bottleneck": {"mid_block_type": None, "act_fn": "mish"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 2, "dropout": 0.4},
    "attn_norm_num_groups": {"attn_norm_num_groups": 2, "act_fn": "swish"},
    "attn_norm_num_groups scale_shift": {"attn_norm_num_groups": 8, "resnet_time_scale_shift": "scale_shift"},
    "positional sin first": {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 24},
    "positional odd width": {"block_out_channels": (9, 12), "norm_num_groups": 3, "attention_head_dim": 3},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 50},
    "class table": {"num_class_embeds": 5},
    "class as timestep": {"class_embed_type": "timestep", "num_class_embeds": 5},
    "class as vector": {"class_embed_type": "identity"},
    "asymmetric padding": {"downsample_padding": 0, "sample_size": (8, 12)},
    "centered, other channels": {"center_input_sample": True, "in_channels": 1, "out_channels": 6},
    "three layers, narrowing": {"layers_per_block": 3, "block_out_channels": (16, 8, 12), "sample_size": [8, 16]}
    | {"down_block_types": ("AttnDownBlock2D", *ATTN_DOWN), "up_block_types": (*ATTN_UP, "AttnUpBlock2D")},
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "sample_size": 5,
    },
    "celeba 64": {
        **DDPM,
        "sample_size": 16,
        "block_out_channels": (8, 16, 16, 16, 32),
        "dropout": 0.1,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    "celebahq 256": {
        **DDPM,
        "sample_size": 32,
        "block_out_channels": (8, 8, 16, 16, 32, 32),
        "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    },
}


def tiny(name: str = "attention", **changes) -> dict:
    base = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ATTN_DOWN,
        "up_block_types": ATTN_UP,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return {**base, **CONFIGS[name], **changes}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Perturb every parameter, so that no zero bias or unit gain hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.02
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def make_pair(config: dict) -> tuple[UNet2DModel, CustomUNet2DModel]:
    """diffusers' network and ours with the same random weights, in training mode."""
    torch.manual_seed(0)
    reference, ours = UNet2DModel(**config), CustomUNet2DModel(**config)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in reference.named_parameters()]
    randomize(reference)
    ours.load_state_dict(reference.state_dict())
    return reference.train(), ours.train()


def make_inputs(model, batch_size: int = 2) -> dict:
    torch.manual_seed(1)
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    labels = None
    if model.config.class_embed_type == "identity":
        labels = torch.randn(batch_size, 4 * model.config.block_out_channels[0])
    elif model.config.class_embed_type or model.config.num_class_embeds:
        labels = torch.randint(1, 5, (batch_size,))
    return {
        "sample": torch.randn(batch_size, model.config.in_channels, height, width),
        "timestep": torch.randint(1, 50, (batch_size,)),
        "class_labels": labels,
    }


def run(model, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradients of all parameters and of the input, for one draw of the dropout."""
    model.zero_grad()
    sample = inputs["sample"].clone().requires_grad_()
    torch.manual_seed(2)
    output = model(**{**inputs, "sample": sample}).sample
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return output.detach(), {**gradients, "sample": sample.grad}


def assert_same_gradients(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())  # some are zero but for rounding
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * max(gradient.norm(), floor), name


# ----------------------------------------------------------------------------------------- parity with diffusers


@pytest.fixture
def dropout_by_position(monkeypatch):
    """Dropout that depends only on positions; PyTorch's also depends on the memory layout, which may differ."""

    def forward(dropout: torch.nn.Dropout, hidden: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0)) >= dropout.p
        return hidden * kept / (1 - dropout.p) if dropout.training else hidden

    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)


@pytest.mark.usefixtures("dropout_by_position")
@pytest.mark.parametrize("name", CONFIGS)
def test_names_outputs_and_gradients_match_diffusers(name):
    reference, ours = make_pair(tiny(name))
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert dict(ours.config) == dict(reference.config)

    inputs = make_inputs(reference)
    expected, expected_gradients = run(reference, inputs)
    output, gradients = run(ours, inputs)
    assert expected.std() > 5e-3
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients)


def test_signatures_match_diffusers():
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in (CustomUNet2DModel, UNet2DModel))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_timestep_may_be_a_number_or_a_scalar_or_batched_tensor():
    _, model = make_pair(tiny())
    sample = make_inputs(model)["sample"]
    expected = model(sample, torch.tensor([7, 7])).sample
    assert (model(sample, 8).sample - expected).abs().max() > 1e-4
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        torch.testing.assert_close(model(sample, timestep).sample, expected)
    torch.testing.assert_close(model(sample, 7, return_dict=False), (expected,))


# ------------------------------------------------------------------------------------------- old attention names


@pytest.mark.parametrize("name", ["celebahq 256", "NCSN++"])
def test_old_attention_names_load(name, tmp_path):
    """From a folder and from a state dictionary."""
    reference, ours = make_pair(tiny(name))
    reference.eval().save_config(tmp_path)
    old = {}
    for key, value in reference.state_dict().items():
        for new_name, old_name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = value
    assert old.keys() != reference.state_dict().keys()
    safetensors.torch.save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded, info = CustomUNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    randomize(ours, seed=3)
    ours.load_state_dict(old)
    inputs = make_inputs(reference)
    for network in (loaded, ours.eval()):
        torch.testing.assert_close(network(**inputs).sample, reference(**inputs).sample, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------- compilation, memory, precision


@pytest.mark.parametrize("name", ["class table", "mixed skip blocks"])
def test_compiles_once_without_a_graph_break(name):
    _, model = make_pair(tiny(name, layers_per_block=1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(model)
    for timestep in (inputs["timestep"], inputs["timestep"] + 1):
        inputs["timestep"] = timestep
        with torch._dynamo.config.patch(error_on_recompile=True):
            output, gradients = run(compiled, inputs)
        expected, expected_gradients = run(model, inputs)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        assert_same_gradients({k.removeprefix("_orig_mod."): v for k, v in gradients.items()}, expected_gradients)


@pytest.mark.parametrize("name", ["attention", "NCSN++", "resnet resampling"])
def test_channels_last_gives_the_same_output_and_gradients(name):
    _, model = make_pair(tiny(name))
    inputs = make_inputs(model)
    expected, expected_gradients = run(model, inputs)
    model.to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    output, gradients = run(model, inputs)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients)


def saved_elements(model, inputs: dict) -> int:
    """The number of elements that the forward pass saves for the backward pass."""
    counted = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: counted.append(t.numel()), lambda _: None):
        model(**inputs)
    return sum(counted)


@pytest.mark.parametrize("name", ["attention", "NCSN++ attention everywhere", "celeba 64", "no bottleneck"])
def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(name):
    _, model = make_pair(tiny(name, dropout=0.3))
    inputs = make_inputs(model)
    expected, expected_gradients = run(model, inputs)
    elements_without = saved_elements(model, inputs)

    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    output, gradients = run(model, inputs)
    assert torch.equal(output, expected)
    assert_same_gradients(gradients, expected_gradients)
    assert saved_elements(model, inputs) < 0.5 * elements_without

    model.disable_gradient_checkpointing()
    assert saved_elements(model, inputs) == elements_without


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["attention", "NCSN++", "class as timestep", "resnet resampling"])
def test_autocast_and_half_precision_weights_match_float32(name, dtype, tmp_path):
    _, model = make_pair(tiny(name))
    inputs = make_inputs(model.eval())
    inputs["timestep"] = inputs["timestep"].float()
    expected = model(**inputs).sample.detach()
    tolerance = {"atol": 0.2 * expected.std().item(), "rtol": 0.1}
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(model(**inputs).sample.float(), expected, **tolerance)

    model.save_pretrained(tmp_path)
    inputs["sample"] = inputs["sample"].to(dtype)
    for half in (CustomUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype), model.to(dtype)):
        output = half.train()(**inputs).sample
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, **tolerance)
        output.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "NCSN++", "resnet resampling", "class table", "celeba 64"])
def test_layerwise_casting_to_float8_matches_diffusers(name):
    reference, ours = make_pair(tiny(name))
    inputs = make_inputs(ours)
    for model in (reference.eval(), ours.eval()):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())
    torch.testing.assert_close(ours(**inputs).sample, reference(**inputs).sample, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ rejected arguments

INVALID_CONFIGS = {
    "time_embedding_type": {"time_embedding_type": "sinusoidal"},
    "mid_block_type": {"mid_block_type": "UNetMidBlock2DCrossAttn"},
    "downsample_padding": {"downsample_padding": True},
    "downsample_type": {"downsample_type": "fir"},
    "upsample_type": {"upsample_type": None},
    "act_fn": {"act_fn": "tanh"},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "spatial"},
    "class_embed_type": {"class_embed_type": "projection"},
    "KUpBlock2D": {"up_block_types": ("KUpBlock2D", "UpBlock2D")},
    "down_block_types has 1 entries": {"down_block_types": ("DownBlock2D",)},
    "up_block_types has 3 entries": {"up_block_types": ("UpBlock2D",) * 3},
    r"block_out_channels=\(\)": {"block_out_channels": (), "down_block_types": (), "up_block_types": ()},
    r"block_out_channels=\(8, 16.0\)": {"block_out_channels": (8, 16.0)},
    "sample_size=9": {"sample_size": 9},
    r"sample_size=\(8, 8, 8\)": {"sample_size": (8, 8, 8)},
    "4 groups do not divide the 6 channels": {"block_out_channels": (6, 16)},
    "5 groups do not divide": {"attn_norm_num_groups": 5},
    "32 groups do not divide the 48 channels": {
        "block_out_channels": (32, 48),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    },
    "0 groups do not divide": {
        "block_out_channels": (3, 16),
        "down_block_types": ("SkipDownBlock2D",) * 2,
        "norm_num_groups": 1,
    },
    "attention_head_dim=32 is more than the 16": {"attention_head_dim": 32},
    "num_train_timesteps=None": {"time_embedding_type": "learned"},
    "freq_shift=4": {"freq_shift": 4},
    "in_channels=0": {"in_channels": 0},
    "layers_per_block=1.5": {"layers_per_block": 1.5},
    "norm_num_groups=None": {"norm_num_groups": None},
    "num_class_embeds=-1": {"num_class_embeds": -1},
    "mid_block_scale_factor=0": {"mid_block_scale_factor": 0},
    "norm_eps=0": {"norm_eps": 0.0},
    "dropout=-0.1": {"dropout": -0.1},
}


@pytest.mark.parametrize("message", INVALID_CONFIGS)
def test_invalid_configs_raise_one_line_errors(message):
    with pytest.raises(ValueError, match=message) as error:
        CustomUNet2DModel(**tiny(**INVALID_CONFIGS[message]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["down", "up"])
def test_skip_blocks_are_rejected_exactly_where_diffusers_crashes(path):
    plain = f"{path.capitalize()}Block2D"
    others = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    for block_types, channels in itertools.product(itertools.product((plain, f"Skip{plain}"), repeat=3), (3, 4)):
        config = tiny(block_out_channels=(8, 8, 8), in_channels=channels, out_channels=channels, **others)
        config[f"{path}_block_types"] = block_types
        try:
            CustomUNet2DModel(**config)
        except ValueError:
            with pytest.raises(RuntimeError):
                UNet2DModel(**config)(torch.randn(1, channels, 8, 8), 1)
        else:
            UNet2DModel(**config)(torch.randn(1, channels, 8, 8), 1)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"sample": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\): expected \(batch, 3"),
        ({}, {"sample": torch.zeros(2, 3, 9, 8)}, "9x8 pixels: .* multiples of 2"),
        ({}, {"class_labels": torch.tensor([1, 2])}, "class_labels were given"),
        ({"num_class_embeds": 5}, {}, "class_labels is None"),
    ],
)
def test_invalid_inputs_raise_one_line_errors(changes, arguments, message):
    model = CustomUNet2DModel(**tiny(**changes))
    with pytest.raises(ValueError, match=message):
        model(**{"sample": torch.zeros(2, 3, 8, 8), "timestep": 1, **arguments})


def test_sizes_other_than_sample_size_are_accepted():
    _, model = make_pair(tiny(sample_size=None))
    assert model(torch.zeros(2, 3, 6, 10), 1).sample.shape == (2, 3, 6, 10)
