"""The configuration: precedence, round trip, and one-line errors for invalid settings."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from common import InputError
from custom_unet import CustomUNet2DModel
from training.arguments import parse_config
from training.config import PATHS, UNET_OPTIONS
from training.log import levels_without_time
from training.processes import check_launcher

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TOKEN = "hf_" + "aB3" * 11
SECRET = "hf_secret"
BASE = "dataset_name: synthetic-faces\nmax_train_steps: 10\n"
EDM, FLOW = "--objective edm", "--objective flow"
VE = "--objective ve --time_embedding_type fourier"


@pytest.fixture
def parse(tmp_path):
    def parse(yaml_text: str = BASE, *flags: str):
        path = tmp_path / "config.yaml"
        path.write_text(yaml_text)
        return parse_config(["--config", str(path), *flags])

    return parse


def test_flags_override_the_file_and_the_file_overrides_defaults(parse):
    config = parse(BASE + "learning_rate: 3e-4\nresolution: 32\n", "--resolution", "16")
    assert (config.learning_rate, config.resolution, config.train_batch_size) == (3e-4, 16, 16)


def test_values_have_the_declared_types_and_the_saved_configuration_reads_back_unchanged(parse):
    config = parse(
        BASE + "block_out_channels: [8, 16]\nattention_head_dim: null\nsnr_gamma: 5\nrandom_flip: true\n"
        "up_block_types: [AttnUpBlock2D, UpBlock2D]\nnorm_num_groups: 8\n",
        *["--down_block_types", "DownBlock2D", "AttnDownBlock2D", "--no_add_attention", "--compile", "false"],
    )
    assert parse(config.to_yaml()) == config
    assert config.block_out_channels == [8, 16]
    assert (config.attention_head_dim, config.snr_gamma, config.random_flip) == (None, 5.0, True)
    assert config.down_block_types == ["DownBlock2D", "AttnDownBlock2D"]
    assert (config.add_attention, config.compile) == (False, False)


def test_null_on_the_command_line_overrides_the_file_and_the_last_value_wins(parse):
    config = parse(BASE + "validation_split: validation\nmetric: fid\n", "--validation_split=null", "--metric", "null")
    assert (config.validation_split, config.metric) == (None, None)
    assert parse(BASE, "--attention_head_dim", "null").attention_head_dim is None
    assert parse(BASE, "--snr_gamma", "5", "--snr_gamma", "null").snr_gamma is None
    assert parse(BASE, "--snr_gamma=null", "--snr_gamma=5").snr_gamma == 5.0
    assert "seed" in parse_error(parse, BASE, "--seed", "null")


def test_data_flags_replace_the_data_source_of_the_file(parse, tmp_path, caplog):
    """A new user passes a folder of images and no configuration, so the quickstart's is read."""
    caplog.set_level("INFO")
    config = parse_config(["--train_data_dir", "faces", "--output_dir", str(tmp_path / "run")])
    assert (config.train_data_dir, config.dataset_name, config.validation_split) == ("faces", None, None)
    assert caplog.messages == [
        "no --config given: using configs/quickstart.yaml",
        "--train_data_dir replaces dataset_name, validation_split of quickstart.yaml",
    ]
    hub_yaml = BASE.replace("synthetic-faces", "a/b") + "dataset_revision: abc\nvalidation_split: test\n"
    config = parse(hub_yaml, "--train_data_dir", "faces", "--validation_split", "validation")
    assert (config.dataset_revision, config.validation_split) == (None, "validation")
    config = parse(hub_yaml, "--dataset_name", "c/d")
    assert (config.dataset_name, config.dataset_revision, config.validation_split) == ("c/d", None, "test")
    folder_yaml = "train_data_dir: faces\nmax_train_steps: 10\n"
    assert parse(folder_yaml, "--dataset_name", "synthetic-faces").train_data_dir is None


def test_flags_of_length_and_objective_replace_entries_of_the_file(parse):
    config = parse(BASE, "--num_epochs", "3")
    assert (config.num_epochs, config.max_train_steps) == (3, None)
    assert parse(BASE + "num_epochs: 2\n").max_train_steps == 10
    assert parse(BASE, "--num_epochs", "3", "--max_train_steps", "5").max_train_steps == 5
    ddpm = BASE + "ddpm_beta_schedule: squaredcos_cap_v2\nsnr_gamma: 5.0\nprediction_type: v_prediction\n"
    config = parse(ddpm, "--objective", "flow")
    assert (config.objective, config.snr_gamma, config.ddpm_beta_schedule) == ("flow", None, "linear")


def test_home_folder_is_expanded_in_every_path(parse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(BASE)
    config = parse_config(["--config=~/own.yaml", "--metric=fid", *(f"--{name}=~/{name}" for name in PATHS)])
    assert {name: getattr(config, name) for name in PATHS} == {name: f"{tmp_path}/{name}" for name in PATHS}


def test_public_configuration_has_no_local_paths(parse, tmp_path):
    private = {"train_data_dir": tmp_path / "faces", "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "run"}
    private |= {"logging_dir": tmp_path / "logs", "resume_from_checkpoint": tmp_path / "run" / "checkpoint-3"}
    flags = [str(part) for name, value in private.items() for part in (f"--{name}", value)]
    flags += ["--metric", "fid", "--inception_path", str(tmp_path / "weights.pt")]
    config = parse("max_train_steps: 10\nseed: 7\n", *flags, "--push_to_hub", "--hub_model_id", "someone/faces")
    text = config.to_public_yaml()
    assert str(tmp_path) not in text
    read = parse(text)
    assert (read.train_data_dir, read.output_dir, read.cache_dir, read.seed) == ("faces", "run", None, 7)
    assert (read.push_to_hub, read.hub_model_id, read.resume_from_checkpoint) == (False, None, "latest")


def test_hub_repository_is_named_after_the_run(parse, tmp_path, monkeypatch):
    assert parse(BASE, "--output_dir", "runs/my-faces/").hub_repo_id == "my-faces"
    monkeypatch.chdir(tmp_path)
    assert parse(BASE, "--output_dir", ".").hub_repo_id == tmp_path.name
    assert parse(BASE, "--push_to_hub", "--hub_model_id", "someone/faces").hub_repo_id == "someone/faces"


@pytest.mark.parametrize(
    ("yaml_text", "flags", "message"),
    [
        (BASE, [f"--hub_token={SECRET}"], "HF_TOKEN"),
        (BASE, [f"--password={SECRET}"], "unknown flag --password"),
        (BASE + f"hub_token: {SECRET}\n", [], "HF_TOKEN"),
        (BASE + f"hub_token: '{SECRET}\n", [], "line 4: found unexpected end of stream"),
        (BASE, ["--hub_model_id", TOKEN, "--push_to_hub"], "HF_TOKEN"),
        (BASE + f"hub_model_id: {TOKEN}\npush_to_hub: true\n", [], "HF_TOKEN"),
    ],
)
def test_misplaced_secrets_are_not_printed(parse, yaml_text, flags, message):
    line = parse_error(parse, yaml_text, *flags)
    assert message in line
    assert SECRET not in line
    assert TOKEN not in line


def test_accelerate_launch_settings_must_match_the_configuration(parse, monkeypatch):
    config = parse(BASE)
    settings = {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4", "DYNAMO_BACKEND": "EAGER"}
    for name, asked in settings.items():
        check_launcher(config)
        monkeypatch.setenv(f"ACCELERATE_{name}", asked)
        with pytest.raises(InputError, match=f"asks for {name.lower()} {asked.lower()}"):
            check_launcher(config)
        monkeypatch.delenv(f"ACCELERATE_{name}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_build_their_network(path):
    config = parse_config(["--config", str(path), "--dataset_name", "synthetic-faces"])
    with torch.device("meta"):
        network = CustomUNet2DModel(**config.unet_kwargs())
    assert levels_without_time(config) == []
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    known = {"celeba64_ddim": 78_700_803, "celebahq256": 113_673_219}  # as in the papers
    known |= dict.fromkeys(["vp32", "edm32", "flow32"], 1_624_323)  # compared with each other
    assert num_parameters == known.get(path.stem, num_parameters)


def test_network_options_match_diffusers(parse):
    signature = inspect.signature(UNet2DModel.__init__).parameters
    set_by_the_trainer = {"sample_size", "out_channels", "num_train_timesteps"}
    unconditional = {"class_embed_type", "num_class_embeds"}
    assert {*UNET_OPTIONS} == {*signature} - {"self"} - set_by_the_trainer - unconditional
    kwargs = parse().unet_kwargs()
    assert {name: kwargs[name] for name in UNET_OPTIONS} == {name: signature[name].default for name in UNET_OPTIONS}
    assert "num_class_embeds" not in kwargs
    assert parse().unet_kwargs(num_classes=5)["num_class_embeds"] == 6  # with the null class


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        (BASE + "learning_rat: 1\n", "config.yaml; did you mean learning_rate?"),
        (BASE + "max_train_steps: 20\n", "duplicate key"),
        (BASE + "mixed_precision: no\n", "is False; it should be text: put it in quotes"),
        (BASE + "learning_rate: [1.0e-3, 2.0e-3]\n", "learning_rate in "),
        ("max_train_steps: 1\n", "exactly one"),
        ("dataset_name: synthetic-faces\n", "no length"),
        ("dataset_name: synthetic-faces\nmax_train_minutes: 5\n", "--lr_scheduler cosine needs"),
    ],
)
def test_bad_files_raise_one_line_errors(parse, yaml_text, message):
    assert message in parse_error(parse, yaml_text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resol 32", "did you mean --resolution?"),
        ("--use_ema", "unknown flag --use_ema; see --help"),
        ("--streaming true", "for data sets on the Hub"),
        (f"--output_dir {__file__}/run", "--output_dir"),
        ("--objective vp --sde_beta_max 5", "--sde_beta_max is 5.0; it must be at least 12"),
        ("--dropout 1.5", "below 1"),
        ("--norm_num_groups 5", "5 groups do not divide"),
        ("--act_fn elu", "'elu' is not supported"),
        ("--rescale_betas_zero_snr --prediction_type epsilon", "not epsilon"),
        ("--rescale_betas_zero_snr --prediction_type sample --snr_gamma 5", "weight 0; use only one"),
        ("--snr_weighting soft_min", "without --snr_gamma"),
        ("--validation_split train", "not held out"),
        ("--ddpm_num_inference_steps 2000", "1000"),
        ("--hub_model_id someone/faces", "--push_to_hub"),
        ("--beta_end 0.9", "alphas_cumprod"),
        ("--beta_start 0.03", "must not exceed"),
        ("--label_dropout 0.2", "--label_column"),
        ("--overwrite_output_dir --resume_from_checkpoint runs/checkpoint-3", "deletes checkpoints"),
        # specific to an objective
        ("--sigma_min 0.03", "--sigma_min 0.03 has no effect with --objective ddpm"),
        (f"{FLOW} --snr_gamma 5", "--snr_gamma 5.0 has no effect with --objective flow"),
        ("--time_embedding_type fourier", "ddpm needs --time_embedding_type positional or learned"),
        ("--objective ve", "ve needs --time_embedding_type fourier"),
        (f"{EDM} --sigma_max 5", "--sigma_max is 5.0; it must be at least 10"),
        (f"{VE} --sigma_min 0.1", "--sigma_min is 0.1; it must be at most 0.05"),
    ],
)
def test_bad_options_raise_one_line_errors(parse, flags, message):
    assert message in parse_error(parse, BASE, *flags.split())


def parse_error(parse, *arguments: str) -> str:
    with pytest.raises(InputError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "scheduler"),
    [
        ("", {"num_train_timesteps": 1000, "prediction_type": "v_prediction"}),
        ("--objective subvp --sde_beta_max 15 --likelihood_weighting", {"beta_max": 15.0}),
        (f"{VE} --sigma_max 50", {"prediction_type": "score", "sigma_min": None, "sigma_max": 50.0}),
        (f"{EDM} --sigma_data 0.4 --noise_mean -1", {"prediction_type": "edm", "sigma_data": 0.4}),
        (f"{FLOW} --time_density logit_normal", {"prediction_type": "flow_prediction", "clip_sample": False}),
    ],
)
def test_flags_determine_the_noise_scheduler(parse, flags, scheduler):
    made = parse(BASE, *flags.split()).noise_scheduler().config
    assert {name: made[name] for name in scheduler} == scheduler


def test_objective_settings_contain_only_relevant_options(parse):
    assert parse(BASE, *VE.split()).objective_settings() == {
        "objective": "ve",
        "likelihood_weighting": False,
        "sigma_min": 0.02,
        "sigma_max": 100.0,
    }


def test_stray_argument_is_not_appended_to_a_list_of_the_file(parse):
    assert "unknown flag 64" in parse_error(parse, BASE + "block_out_channels: [32, 64, 64]\n", "64")
