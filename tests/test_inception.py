"""Inception beside NVIDIA's TorchScript in clean-fid's own functions; how its file is found.

The tests of the real network need its weights: `make inception`.
"""

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from accelerate import PartialState
from cleanfid import fid
from torch import nn

from common import InputError
from eval import inception
from eval.distances import frechet_distance, kernel_distance
from eval.encoders import open_extractor
from eval.features import extract_features, images_of_files
from eval.inception import NVIDIA, PACKAGED, Inception, find_weights, load_network, resize_as_tensorflow
from tests.stand_in_networks import draw_images, write_images

PACKAGED_FILE = inception._packaged_file()
real_network = pytest.mark.skipif(PACKAGED_FILE is None, reason="needs Inception's weights: make inception")


# ---- The real network


class TorchScript(nn.Module):
    """NVIDIA's network as clean-fid calls it: images in 0..255 that are resized already."""

    def __init__(self):
        super().__init__()
        self.layers = torch.jit.load(str(PACKAGED_FILE)).net.layers.eval()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 128) / 128).flatten(1)


@pytest.fixture(scope="module")
def state():
    return PartialState(cpu=True)


@pytest.fixture(scope="module")
def extractor():
    return Inception(path=PACKAGED_FILE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of PNGs of different distributions, 20 images each."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "generated", draw_images(20, seed=0))
    write_images(root / "reference", draw_images(20, seed=1, tint=0.1))
    return root / "generated", root / "reference"


@pytest.fixture(scope="module")
def theirs(folders):
    """clean-fid's features of both folders."""
    options = {"num_workers": 0, "batch_size": 10, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    return [fid.get_folder_features(str(folder), TorchScript(), **options) for folder in folders]


def features_of(folder, extractor, state) -> np.ndarray:
    return extract_features(images_of_files(sorted(folder.glob("*.png"))), extractor, state, batch_size=16)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@real_network
def test_same_features_and_distances_as_clean_fid(folders, theirs, extractor, state):
    """By its resize and its loop over files, through TorchScript with its batch norms; the distances by its code."""
    ours = [features_of(folder, extractor, state) for folder in folders]
    assert ours[0].shape == (20, 2048)
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_error(found, expected) < 1e-5
    few = [features[:, :64] for features in theirs]  # clean-fid's root of 2,048 x 2,048 matrices takes a minute
    expected_fid = fid.fid_from_feats(*few)
    assert frechet_distance(*(features[:, :64] for features in ours)) == pytest.approx(expected_fid, rel=1e-4)
    np.random.seed(3)
    assert kernel_distance(*ours, seed=3).mean == pytest.approx(fid.kernel_distance(*theirs), rel=1e-4)


@real_network
@pytest.mark.parametrize("fault", ["channels", "range", "resize", "nearest"])
def test_what_would_change_the_features_is_seen(fault, folders, theirs, extractor, state, monkeypatch):
    images = images_of_files(sorted(folders[0].glob("*.png"))[:8]).read(range(8))
    if fault == "channels":
        images = images[:, ::-1].copy()
    elif fault == "range":
        images = images // 2
    elif fault == "resize":
        monkeypatch.setattr(extractor, "mode", "legacy_tensorflow")
    else:
        monkeypatch.setattr(extractor, "resize_one", lambda image: image.repeat(15, 0).repeat(15, 1).astype("float32"))
    assert relative_error(extractor(torch.from_numpy(images)).numpy(), theirs[0][:8]) > 0.01


# ---- Without it


@pytest.mark.parametrize("size", [(20, 20), (32, 48)])
def test_resize_as_tensorflow(size):
    """Beside NVIDIA's own form of it, a grid of samples shifted to the upper left corner."""
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    theta = torch.eye(2, 3)
    theta[0, 2] = 1 / size[1] - 1 / 299
    theta[1, 2] = 1 / size[0] - 1 / 299
    grid = nn.functional.affine_grid(theta.repeat(2, 1, 1), [2, 3, 299, 299], align_corners=False)
    expected = nn.functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(resize_as_tensorflow(images, 299), expected, rtol=0, atol=0.02)


def test_an_unknown_mode():
    with pytest.raises(InputError, match="unknown mode 'legacy' of Inception; choose clean or legacy_tensorflow"):
        Inception("legacy")


class Tensors(nn.Module):
    """What is read of NVIDIA's file: 94 convolutions in order, under their names, and a last layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        network, self.layers = inception.build_network(), nn.Module()
        for number, block in enumerate(m for m in network.modules() if isinstance(m, inception.BasicConv2d)):
            layer = nn.Module()
            layer.weight, width = nn.Parameter(block.conv.weight.detach().clone()), len(block.conv.weight)
            layer.beta, layer.mean = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
            layer.var = nn.Parameter(torch.rand(width) + 0.5)
            setattr(self.layers, f"conv_{number}", layer)
        self.output = nn.Linear(8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_batch_norms_are_folded(tmp_path):
    tensors = Tensors()
    torch.jit.script(tensors).save(str(tmp_path / "network.pt"))
    folded, plain = load_network(tmp_path / "network.pt"), inception.build_network().eval()
    blocks = [module for module in plain.modules() if isinstance(module, inception.BasicConv2d)]
    for block, layer in zip(blocks, tensors.layers.children(), strict=True):
        block.conv.weight.data.copy_(layer.weight)
        block.bn.bias.data.copy_(layer.beta)
        block.bn.running_mean.copy_(layer.mean)
        block.bn.running_var.copy_(layer.var)
    images = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(folded(images), plain(images), rtol=1e-3, atol=1e-4)


# ---- The file


class Server:
    """Answers every GET with the bytes of `content`, but announces `length` bytes."""

    def __init__(self):
        self.content, self.length, self.num_requests = b"", 0, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.num_requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(server.length))
                self.end_headers()
                self.wfile.write(server.content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/pretrained/{NVIDIA.file}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, content: bytes, length: int | None = None) -> None:
        self.content, self.length = content, len(content) if length is None else length


WHOLE = b"the weights " * 1000


@pytest.fixture
def server(monkeypatch):
    server = Server()
    server.serve(WHOLE)
    monkeypatch.setattr(inception, "NVIDIA_URL", server.address)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The cache's and the package's file, neither of which is there; both must have the content of `WHOLE`."""
    cache, packaged = tmp_path / "train_unet_eval" / "weights" / NVIDIA.file, tmp_path / "package" / "default_1.pt"
    packaged.parent.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "_packaged_file", lambda: packaged)
    sha256 = inception.hashlib.sha256(WHOLE).hexdigest()
    for name, weights in (("NVIDIA", NVIDIA), ("PACKAGED", PACKAGED)):
        monkeypatch.setattr(inception, name, replace(weights, sha256=sha256))
    return cache, packaged


def test_the_order_in_which_the_file_is_looked_for(server, files, tmp_path):
    """By path, in the cache, in the package, at NVIDIA's address."""
    cache, packaged = files
    packaged.write_bytes(WHOLE)
    assert find_weights() == (packaged, inception.PACKAGED)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(WHOLE)
    assert find_weights() == (cache, inception.NVIDIA)
    given = tmp_path / "given.pt"
    given.write_bytes(WHOLE)
    assert find_weights(given)[0] == given
    assert server.num_requests == 0
    cache.unlink()
    packaged.unlink()
    assert find_weights() == (cache, inception.NVIDIA)
    assert find_weights() == (cache, inception.NVIDIA)
    assert server.num_requests == 1
    assert [path.name for path in cache.parent.iterdir()] == [NVIDIA.file]


@pytest.mark.parametrize("fault", ["cut", "another", "empty"])
def test_a_bad_download_is_never_used(fault, server, files):
    server.serve({"cut": WHOLE[:5000], "another": b"<html>moved</html>", "empty": b""}[fault])
    if fault == "cut":
        server.length = len(WHOLE)
    with pytest.raises(InputError) as error:
        find_weights()
    assert "\n" not in str(error.value)
    assert "make inception" in str(error.value)
    assert not files[0].parent.exists()
    server.serve(WHOLE)
    assert find_weights()[0].read_bytes() == WHOLE


@pytest.mark.parametrize("content", [WHOLE[:1000], WHOLE[:-1] + b"!"], ids=["truncated", "flipped"])
def test_a_damaged_file_is_not_used(content, server, files, capsys):
    cache, packaged = files
    cache.parent.mkdir(parents=True)
    for path in files:
        path.write_bytes(content)
    assert find_weights()[0].read_bytes() == WHOLE
    told = capsys.readouterr().out
    assert f"{cache} is damaged and not used: its sha256 is " in told
    assert f"{packaged} is damaged and not used: its sha256 is " in told
    assert server.num_requests == 1


def test_a_wrong_file_given_by_path(tmp_path):
    (tmp_path / "other.pt").write_bytes(WHOLE)
    with pytest.raises(InputError) as error:
        open_extractor("inception", path=tmp_path / "other.pt")
    assert "other.pt is damaged or not Inception: its sha256 is " in str(error.value)
    assert NVIDIA.sha256 in str(error.value)
    assert PACKAGED.sha256 in str(error.value)
    with pytest.raises(InputError, match=r"missing\.pt is not a file; run `make inception`"):
        open_extractor("inception", path=tmp_path / "missing.pt")


def test_offline_without_weights(files, monkeypatch):
    monkeypatch.setattr(inception, "NVIDIA_URL", "http://127.0.0.1:9/inception.pt")  # nothing listens there
    with pytest.raises(InputError) as error:
        find_weights()
    assert "could not be downloaded ([Errno 111] Connection refused); run `make inception`" in str(error.value)
    assert not files[0].parent.exists()
