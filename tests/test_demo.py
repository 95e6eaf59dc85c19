"""The web page in a browser: it shows the pipeline's own images and contacts no other host."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.context import LocalContext
from PIL import Image, ImageOps
from playwright.sync_api import Locator, Page, expect, sync_playwright
from tiny_pipeline import quiet, tiny_pipeline
from tiny_training import error_line

from pipelines import CustomUNetPipeline, demo
from pipelines.applications import denoising_strip, impute, interpolate
from pipelines.demo import build_demo, main
from pipelines.export import export_pipeline
from training.sde import SDEScheduler

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, STEPS = 8, 4
BRUSH_COLOR = (255, 45, 149)
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
TIMEOUT_MILLISECONDS = 120_000  # reached only if the page hangs
WAIT_FOR_FRAMES = """async (number) => {
    for (let i = 0; i < number; i++) await new Promise((resolve) => requestAnimationFrame(resolve));
}"""
expect.set_options(timeout=TIMEOUT_MILLISECONDS)


@pytest.fixture(scope="module")
def pipe() -> CustomUNetPipeline:
    return tiny_pipeline()


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
    """The address of the tiny model's page, served by `python -m pipelines.demo` on the first free port."""
    command = [sys.executable, "-u", "-m", "pipelines.demo", "--pipeline", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as server:
        printed = []
        for line in server.stdout:  # ends when the server exits
            printed.append(line)
            if "Running on local URL" in line:
                break
        else:
            pytest.fail(f"the server did not come up: {''.join(printed)}")
        threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would block the server
        yield re.search(r"http://\S+", line).group().rstrip("/") + "/"
        server.kill()


@pytest.fixture
def page(browser, address):
    """A visitor's open page. Teardown fails if it had an error or contacted another host."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT_MILLISECONDS)
    problems = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and problems.append(response.url))
    page.on("requestfailed", lambda request: is_real_failure(request) and problems.append(request.url))
    ours = (address, f"blob:{address}", "data:")
    page.on("request", lambda request: request.url.startswith(ours) or problems.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.close()
    assert problems == []


def is_real_failure(request) -> bool:
    """False for a request that Gradio aborts itself, the stream of a queue after its last event."""
    return not (request.failure == "net::ERR_ABORTED" and "/queue/data" in request.url)


# ---- What a visitor does and sees


def type_into(page: Page, **values: float) -> None:
    """Fill number fields, or the number fields of sliders, by label (`_` for a space).

    Up to three animation frames after Gradio shows the fields of a tab, it resets them to their initial values
    (`render_previously_invisible_children` in its front end), so a value must still be there six frames later.
    """
    for name, value in values.items():
        label = name.replace("_", " ")
        field = page.locator(f'[aria-label="number input for {label}"]:visible, [aria-label="{label}"]:visible')
        is_kept = False
        while not is_kept:
            field.fill(str(value))
            field.press("Tab")
            page.evaluate(WAIT_FOR_FRAMES, 6)
            is_kept = field.input_value() == str(value)


def choose_sampler(page: Page, name: str) -> None:
    page.get_by_role("combobox", name="Sampler").locator("visible=true").click()
    page.get_by_role("option", name=name, exact=True).click()


def click(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def picture(shown: Locator) -> Image.Image:
    """The image file shown by an element of the page."""
    shown.wait_for()
    return Image.open(io.BytesIO(shown.page.request.get(shown.get_attribute("src")).body()))


def gallery(page: Page, number: int) -> list[Image.Image]:
    """The images of the open tab's gallery."""
    images = page.locator(".grid-container:visible img")
    expect(images).to_have_count(number)
    return [picture(images.nth(i)) for i in range(number)]


def network_sized(images: list[Image.Image]) -> np.ndarray:
    """The images at the network's size, int (B, H, W, 3); they must be enlarged to blocks of equal pixels."""
    small = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST) for image in images]
    for image, original in zip(images, small, strict=True):
        np.testing.assert_array_equal(original.resize((512, 512), Image.Resampling.NEAREST), image)
    return np.stack(small).astype(int)


def assert_same(shown: list[Image.Image], images: list[Image.Image]) -> None:
    """Equal up to 1 of 255, because another process may sum in a different order."""
    np.testing.assert_allclose(network_sized(shown), np.stack(images).astype(int), atol=1)


def draw_stroke(page: Page) -> None:
    """Draw across the middle of the editor until it shows: the editor is ready some time after it has an image."""
    canvas = page.locator("canvas").last
    page.get_by_role("button", name="Brush Size", exact=True).wait_for()
    while True:
        shown = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
        if shown.getpixel((shown.width // 2, shown.height // 2)) == BRUSH_COLOR:
            return
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 40, y)
        page.mouse.down()
        page.mouse.move(x + 40, y)
        page.mouse.up()


# ---- In the browser


def test_generate(page, pipe, folder):
    expect(page.get_by_role("heading", level=1)).to_have_text(str(folder))
    expect(page.get_by_text("images of 8x8 pixels")).to_be_visible()
    type_into(page, Seed_of_the_first_image=5, Images=3, Steps=STEPS, eta=1)
    click(page, "Generate")
    assert_same(gallery(page, 3), pipe(seeds=[5, 6, 7], num_inference_steps=STEPS, eta=1.0).images)
    assert page.locator(".caption-label:visible").all_inner_texts() == ["seed 5", "seed 6", "seed 7"]


def test_denoising(page, pipe):
    open_tab(page, "Denoising")
    type_into(page, Seed=3, Frames=4, Steps=6)
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
    type_into(page, Seed_of_the_first_image=2, Seed_of_the_last_image=9, Images=5, Steps=STEPS)
    click(page, "Interpolate")
    assert_same(gallery(page, 5), interpolate(pipe, 2, 9, 5, STEPS))


@pytest.mark.parametrize("source", ["seed", "upload"])
def test_inpainting(page, pipe, source, tmp_path):
    open_tab(page, "Inpainting")
    type_into(page, Steps=STEPS, Results=2)
    if source == "seed":
        type_into(page, **{"1. Use the image of a seed ...": 3})
        click(page, "Use this image")
        (image,) = pipe(seeds=[3], num_inference_steps=STEPS).images
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "wide.png")
        page.get_by_label("File upload").first.set_input_files(tmp_path / "wide.png")
        image = ImageOps.fit(Image.fromarray(pixels), (SIZE, SIZE), method=Image.Resampling.BICUBIC)
    draw_stroke(page)
    click(page, "Repaint")
    results = network_sized(gallery(page, 2))
    changed = (np.abs(results - np.asarray(image).astype(int)) > 1).any(axis=-1)
    rows, columns = np.nonzero(changed.any(axis=0))
    assert changed[:, 3:5, 3:5].all()
    assert set(rows) <= {2, 3, 4, 5}
    assert set(columns) <= {1, 2, 3, 4, 5, 6}
    assert (results[0] != results[1]).any()


def test_errors_are_shown_on_the_page(page):
    choose_sampler(page, "edm_heun")
    type_into(page, Steps=1)
    click(page, "Generate")
    expect(page.get_by_text("num_inference_steps is 1")).to_be_visible()
    open_tab(page, "Inpainting")
    click(page, "Repaint")
    expect(page.get_by_text("no image yet")).to_be_visible()
    type_into(page, Steps=STEPS)
    click(page, "Use this image")
    page.get_by_role("button", name="Brush Size", exact=True).wait_for()
    click(page, "Repaint")
    expect(page.get_by_text("no mask yet")).to_be_visible()


# ---- Continuous-time models, without a browser


@pytest.fixture(scope="module")
def sde_pipe(pipe) -> CustomUNetPipeline:
    return quiet(CustomUNetPipeline(pipe.unet, SDEScheduler(objective="edm", prediction_type="edm")))


def test_page_offers_its_samplers_and_starts_with_the_models_own(sde_pipe):
    shown = build_demo(sde_pipe).get_config_file()["components"]
    sampler = next(component["props"] for component in shown if component["type"] == "dropdown")
    assert [choice for choice, _ in sampler["choices"]] == list(sde_pipe.samplers)
    assert sampler["value"] == "edm_heun"
    own = CustomUNetPipeline(sde_pipe.unet, demo.SAMPLERS["dpmsolver++3m"][0](solver_order=3))
    assert demo.Page(own).own_sampler == "dpmsolver++3m"


@pytest.mark.parametrize("sampler", ["edm_heun", "ode"])
def test_sde_page_generates_and_reports_progress(sde_pipe, sampler, monkeypatch):
    sent = []  # steps done and total, of the progress bars that Gradio sends to the page
    send = staticmethod(lambda: lambda bars: sent.extend((bar.index, bar.length) for bar in bars))
    monkeypatch.setattr(gr.Progress, "_progress_callback", send)
    LocalContext.progress.set(demo.PROGRESS)  # as Gradio does when it calls a tab's function
    shown = demo.Page(sde_pipe).generate(5, 2, sampler, STEPS, 0.5)
    LocalContext.progress.set(None)
    own = quiet(CustomUNetPipeline(sde_pipe.unet, sde_pipe.scheduler))
    own.set_sampler(sampler)
    result = own(seeds=[5, 6], num_inference_steps=STEPS)
    assert_same([image for image, _ in shown], result.images)
    assert sde_pipe.continuous_sampler.name == "edm_heun", "the sampler is the visitor's own"
    steps = result.network_evaluations
    assert sent[-1] == (steps, None if sampler == "ode" else steps)  # the ODE's total is not known in advance


def test_sde_page_denoises_interpolates_and_inpaints(sde_pipe):
    tabs = demo.Page(sde_pipe)
    strip, levels, _ = next(tabs.denoise(3, 4, "edm_heun", STEPS, 0))
    expected = denoising_strip(sde_pipe, 4, STEPS, seeds=[3])
    np.testing.assert_array_equal(np.asarray(strip), np.asarray(expected.to_image(16)))
    assert f"t = {expected.timesteps[0]:.3g}, {expected.timesteps[1]:.3g}, " in levels
    shown = tabs.interpolate(2, 9, 5, STEPS)
    assert_same([image for image, _ in shown], interpolate(sde_pipe, 2, 9, 5, STEPS))
    image, background = tabs.image_of_seed(3, STEPS)
    layer = Image.new("RGBA", (512, 512))
    layer.paste((255, 0, 0, 255), (128, 128, 384, 384))
    shown = tabs.inpaint(image, {"background": background, "layers": [layer]}, 7, 2, STEPS, 5)
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[2:6, 2:6] = 1
    assert_same([image for image, _ in shown], impute(sde_pipe, image, mask, STEPS, seeds=[7, 8]))


# ---- The command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--port", "TAKEN"], "is not available and may be in use; choose another --port"),
        (["--pipeline", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(flags, message, folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--pipeline", str(folder), *(port if flag == "TAKEN" else flag for flag in flags)]) == 2
    assert message in error_line(capsys.readouterr().err)


def test_class_conditional_network_is_rejected():
    with pytest.raises(ValueError, match="class embeddings"):
        build_demo(tiny_pipeline(num_class_embeds=2))
