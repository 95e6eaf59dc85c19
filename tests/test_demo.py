"""The web page, in a browser: what it shows are the pipeline's own images, and it asks no other host for anything."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageOps
from playwright.sync_api import Locator, Page, expect, sync_playwright
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from pipelines.applications import denoising_strip, impute, interpolate
from pipelines.demo import Page as Tabs
from pipelines.demo import ProgressBar, build_demo, main
from pipelines.export import export_pipeline
from training.sde import SDEScheduler

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, STEPS = 8, 4
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
TIMEOUT_MILLISECONDS = 120_000  # only a page that hangs takes as long
WAIT_FOR_FRAMES = """async (number) => {
    for (let i = 0; i < number; i++) await new Promise((resolve) => requestAnimationFrame(resolve));
}"""
expect.set_options(timeout=TIMEOUT_MILLISECONDS)


@pytest.fixture(scope="module")
def pipe() -> CustomUNetPipeline:
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    return export_pipeline(pipe, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium")
    if executable is None:
        missing = "there is no Chromium for the web page's tests; `apt install chromium`"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, folder):
    """Of the page of the tiny model, served by `python -m pipelines.demo` on the first free port."""
    command = [sys.executable, "-u", "-m", "pipelines.demo", "--pipeline", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as server:
        printed = []
        for line in server.stdout:  # ends when the server does
            printed.append(line)
            if "Running on local URL" in line:
                break
        else:
            pytest.fail(f"the server did not come up: {''.join(printed)}")
        threading.Thread(target=server.stdout.read, daemon=True).start()  # or a full pipe would stop the server
        yield re.search(r"http://\S+", line).group().rstrip("/") + "/"
        server.kill()


@pytest.fixture
def page(browser, address):
    """A visitor's open page. In the end nothing may have gone wrong in it and no other host been asked."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT_MILLISECONDS)
    problems = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and problems.append(response.url))
    page.on("requestfailed", lambda request: failed_on_its_own(request) and problems.append(request.url))
    page.on("request", lambda request: is_foreign(request.url, address) and problems.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.close()
    assert problems == []


def failed_on_its_own(request) -> bool:
    """Gradio itself aborts the stream of a queue when it has got what it waited for."""
    return not (request.failure == "net::ERR_ABORTED" and "/queue/data" in request.url)


def is_foreign(url: str, address: str) -> bool:
    return not url.startswith((address, f"blob:{address}", "data:"))


# ---- Hands and eyes of a visitor


def type_into(page: Page, label: str, value: float) -> None:
    """Into a number field, or the number field of a slider.

    Up to three animation frames after Gradio shows the fields of a tab, it sets them to their first values once more
    (`render_previously_invisible_children` in its front end), which would undo what is typed before.
    """
    field = page.locator(f'[aria-label="number input for {label}"]:visible, [aria-label="{label}"]:visible')
    field.wait_for()
    page.evaluate(WAIT_FOR_FRAMES, 6)
    field.fill(str(value))
    field.press("Tab")


def choose_sampler(page: Page, name: str) -> None:
    page.get_by_role("combobox", name="Sampler").click()
    page.get_by_role("option", name=name, exact=True).click()


def click(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def picture(shown: Locator) -> Image.Image:
    """The file behind an image of the page."""
    shown.wait_for()
    return Image.open(io.BytesIO(shown.page.request.get(shown.get_attribute("src")).body()))


def gallery(page: Page, number: int) -> np.ndarray:
    """The images of the open tab's gallery at the network's size: uint8 (number, H, W, 3)."""
    images = page.locator(".grid-container:visible img")
    expect(images).to_have_count(number)
    return np.stack([as_drawn(picture(images.nth(i))) for i in range(number)])


def as_drawn(image: Image.Image) -> np.ndarray:
    """Undoes the enlargement, which must be one to blocks of equal pixels."""
    small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST)
    assert image.size == (512, 512)
    np.testing.assert_array_equal(small.resize(image.size, Image.Resampling.NEAREST), image)
    return np.asarray(small)


def assert_same(shown: np.ndarray, images: list[Image.Image]) -> None:
    """Up to the last bit, as another process may add in another order."""
    np.testing.assert_allclose(shown.astype(int), np.stack([np.asarray(i).astype(int) for i in images]), atol=1)


def wait_for_the_image(page: Page) -> None:
    """In the editor, which then has a brush to choose."""
    page.get_by_role("button", name="Brush Size", exact=True).wait_for()


def draw_a_stroke(page: Page) -> None:
    """Over the middle of the editor, which takes strokes only some time after it shows the image."""
    undo = page.get_by_role("button", name="Undo")
    expect(undo).to_be_disabled()
    box = page.locator("canvas").last.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for _ in range(TIMEOUT_MILLISECONDS // 500):
        page.mouse.move(x - 40, y)
        page.mouse.down()
        page.mouse.move(x + 40, y)
        page.mouse.up()
        page.wait_for_timeout(500)
        if undo.is_enabled():
            return
    pytest.fail("the editor takes no strokes")


# ---- Tests


def test_the_page_opens_and_tells_what_it_is(page, folder):
    expect(page.get_by_role("heading", level=1)).to_have_text(str(folder))
    expect(page.get_by_text("images of 8x8 pixels")).to_be_visible()
    for name in ("Denoising", "Interpolation", "Inpainting", "Generate"):
        open_tab(page, name)


def test_generate(page, pipe):
    type_into(page, "Seed of the first image", 5)
    type_into(page, "Images", 3)
    type_into(page, "Steps", STEPS)
    type_into(page, "eta", 1)
    click(page, "Generate")
    assert_same(gallery(page, 3), pipe(seeds=[5, 6, 7], num_inference_steps=STEPS, eta=1.0).images)
    assert page.locator(".caption-label:visible").all_inner_texts() == ["seed 5", "seed 6", "seed 7"]


def test_the_sampler_is_the_visitors_own(page, pipe, browser, address):
    eta = page.get_by_label("number input for eta")
    expect(eta).to_be_visible()
    type_into(page, "eta", 1)
    choose_sampler(page, "euler")
    expect(eta).to_be_hidden()
    type_into(page, "Steps", STEPS)
    type_into(page, "Images", 2)
    click(page, "Generate")
    shown = gallery(page, 2)

    other = browser.new_page()
    other.goto(address)
    type_into(other, "Steps", STEPS)
    type_into(other, "Images", 2)
    click(other, "Generate")
    assert_same(gallery(other, 2), pipe(seeds=[0, 1], num_inference_steps=STEPS).images)
    other.close()

    euler = CustomUNetPipeline(pipe.unet, pipe.scheduler)
    euler.set_progress_bar_config(disable=True)
    euler.set_sampler("euler")
    assert_same(shown, euler(seeds=[0, 1], num_inference_steps=STEPS).images)


def test_denoising(page, pipe):
    open_tab(page, "Denoising")
    type_into(page, "Seed", 3)
    type_into(page, "Frames", 4)
    type_into(page, "Steps", 6)
    click(page, "Show")
    images = page.locator(".image-frame:visible img")
    expect(images).to_have_count(2)
    expected = denoising_strip(pipe, 4, 6, seeds=[3])
    strip, animation = picture(images.nth(0)), picture(images.nth(1))
    np.testing.assert_allclose(np.asarray(strip).astype(int), np.asarray(expected.to_image(16)).astype(int), atol=1)
    assert (animation.format, animation.n_frames) == ("GIF", 4)
    expect(page.get_by_text(f"t = {expected.timesteps[0]}, {expected.timesteps[1]}")).to_be_visible()


def test_interpolation(page, pipe):
    open_tab(page, "Interpolation")
    type_into(page, "Seed of the first image", 2)
    type_into(page, "Seed of the last image", 9)
    type_into(page, "Images", 5)
    type_into(page, "Steps", STEPS)
    click(page, "Interpolate")
    assert_same(gallery(page, 5), interpolate(pipe, 2, 9, 5, STEPS))


@pytest.mark.parametrize("source", ["seed", "upload"])
def test_inpainting(page, pipe, source, tmp_path):
    open_tab(page, "Inpainting")
    type_into(page, "Steps", STEPS)
    type_into(page, "Results", 2)
    if source == "seed":
        type_into(page, "1. Take the image of a seed ...", 3)
        click(page, "Take this image")
        image = pipe(seeds=[3], num_inference_steps=STEPS).images[0]
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "wide.png")
        page.get_by_label("File upload").first.set_input_files(tmp_path / "wide.png")
        image = ImageOps.fit(Image.fromarray(pixels), (SIZE, SIZE), method=Image.Resampling.BICUBIC)
    wait_for_the_image(page)
    draw_a_stroke(page)
    click(page, "Paint anew")
    results = gallery(page, 2)
    changed = (np.abs(results.astype(int) - np.asarray(image).astype(int)) > 1).any(axis=-1)
    rows, columns = np.nonzero(changed.any(axis=0))
    assert changed[:, 3:5, 3:5].all()
    assert rows.min() >= 2
    assert rows.max() <= 5
    assert columns.min() >= 1
    assert columns.max() <= 6
    assert (results[0] != results[1]).any()


def test_what_is_missing_is_told(page):
    open_tab(page, "Inpainting")
    type_into(page, "Steps", STEPS)
    click(page, "Take this image")
    wait_for_the_image(page)
    click(page, "Paint anew")
    expect(page.get_by_text("there is no mask; draw over what is to be painted anew")).to_be_visible()
    click(page, "Clear canvas")
    click(page, "Paint anew")
    expect(page.get_by_text("there is no image; take that of a seed or upload one")).to_be_visible()


def test_what_the_pipeline_refuses_is_told(page):
    choose_sampler(page, "edm_heun")
    type_into(page, "Steps", 1)
    click(page, "Generate")
    expect(page.get_by_text("num_inference_steps is 1")).to_be_visible()


# A model that was trained in continuous time, without a browser


@pytest.fixture(scope="module")
def sde_pipe(pipe) -> CustomUNetPipeline:
    pipe = CustomUNetPipeline(pipe.unet, SDEScheduler(objective="edm", prediction_type="edm"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told() -> tuple[list, object]:
    """What a tab tells of its progress, and what it tells it to."""
    steps = []
    return steps, lambda progress: steps.append(progress)


def parts(demo, kind: str) -> dict[str, dict]:
    """The components of a page of one kind, by their label."""
    found = [component["props"] for component in demo.get_config_file()["components"] if component["type"] == kind]
    return {props["label"]: props for props in found}


def test_the_page_of_an_sde_offers_what_the_model_can_do(pipe, sde_pipe):
    page, plain = build_demo(sde_pipe), build_demo(pipe)
    sampler, of_ddpm = parts(page, "dropdown")["Sampler"], parts(plain, "dropdown")["Sampler"]
    assert [name for name, _ in sampler["choices"]] == list(sde_pipe.samplers)
    assert [name for name, _ in of_ddpm["choices"]] == list(pipe.samplers)
    assert (sampler["value"], of_ddpm["value"]) == ("edm_heun", "ddim")
    resamplings = [parts(demo, "slider")["Resamplings"]["visible"] for demo in (page, plain)]
    assert resamplings == [False, True]
    assert [parts(demo, "slider")["Steps"]["minimum"] for demo in (page, plain)] == [2, 1]
    text = [str(demo.get_config_file()) for demo in (page, plain)]
    assert ["trained in continuous time" in each for each in text] == [True, False]


@pytest.mark.parametrize("sampler", ["edm_heun", "predictor_corrector", "ode"])
def test_the_page_of_an_sde_generates(sde_pipe, sampler):
    steps, progress = told()
    shown = Tabs(sde_pipe).generate(5, 2, sampler, STEPS, 0.5, progress=progress)
    own = CustomUNetPipeline(sde_pipe.unet, sde_pipe.scheduler)
    own.set_progress_bar_config(disable=True)
    own.set_sampler(sampler)
    result = own(seeds=[5, 6], num_inference_steps=STEPS)
    assert_same(np.stack([as_drawn(image) for image, _ in shown]), result.images)
    assert [caption for _, caption in shown] == ["seed 5", "seed 6"]
    assert len(steps) == result.network_evaluations
    assert steps[-1] == ((1, 1) if sampler == "ode" else (len(steps), len(steps)))
    assert sde_pipe.continuous_sampler.name == "edm_heun", "the sampler is the visitor's own"


def test_the_page_of_an_sde_denoises_interpolates_and_paints(sde_pipe, tmp_path):
    tabs, (_, progress) = Tabs(sde_pipe), told()
    ((strip, levels, animation),) = [
        (strip, levels, Image.open(path).n_frames)
        for strip, levels, path in tabs.denoise(3, 4, "edm_heun", STEPS, 0, progress=progress)
    ]
    expected = denoising_strip(sde_pipe, 4, STEPS, seeds=[3])
    np.testing.assert_array_equal(np.asarray(strip), np.asarray(expected.to_image(16)))
    assert animation == 4
    assert f"t = {expected.timesteps[0]:.3g}, {expected.timesteps[1]:.3g}, " in levels
    shown = tabs.interpolate(2, 9, 5, STEPS, progress=progress)
    expected = interpolate(sde_pipe, 2, 9, 5, STEPS)
    assert_same(np.stack([as_drawn(image) for image, _ in shown]), expected)

    image, background = tabs.image_of_seed(3, STEPS, progress=progress)
    layer = Image.new("RGBA", (512, 512))
    layer.paste((255, 0, 0, 255), (128, 128, 384, 384))
    drawing = {"background": background, "layers": [layer]}
    shown = tabs.inpaint(image, drawing, 7, 2, STEPS, 5, progress=progress)
    results = np.stack([as_drawn(image) for image, _ in shown]).astype(int)
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[2:6, 2:6] = 1
    assert_same(results, impute(sde_pipe, image, mask, STEPS, seeds=[7, 8]))
    changed = np.abs(results - np.asarray(image).astype(int)).max(axis=(0, 3)) > 1
    assert changed[3:5, 3:5].all()
    assert not changed[mask == 0].any()


def test_progress_is_told_of_known_and_unknown_lengths():
    steps, progress = told()
    assert list(ProgressBar(progress, "ab", None)) == ["a", "b"]
    with ProgressBar(progress, iter("ab"), None) as bar:
        bar.update()
    assert steps == [(0, 2), (1, 2), (1, None)]


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "."])
def test_a_model_that_cannot_be_loaded_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--pipeline", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "scheduler" / "scheduler_config.json").write_text("[]")
    for arguments, message in (
        ([], "--pipeline"),
        (["--pipeline", str(folder), "--port", "70000"], "--port is 70000"),
        (["--pipeline", str(damaged)], "could not be loaded"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_a_port_in_use_is_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--pipeline", str(folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: port {port} cannot be had, it may be in use; take another --port\n"


def test_a_network_with_classes_is_refused():
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY, num_class_embeds=2), DDIMScheduler())
    with pytest.raises(ValueError, match="class embeddings"):
        build_demo(pipe)
