"""Texts of the model card that do not depend on the run: crops, CelebA's terms and limits, citations."""

CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"

CROPS = {
    "celeba_140": "the central 140x140 of the aligned 178x218 image (rows 39 to 178, columns 19 to 158), as in the"
    " code of score-based SDEs; FIDs do not compare with those of DDIM's 128x128 crop",
    "celeba_128": "128x128 of the aligned 178x218 image around row 121 and column 89 (rows 57 to 184, columns 25 to"
    " 152), as in the code of DDIM; FIDs do not compare with those of the central 140x140 crop",
    "center": "the central square",
    "none": "none; an image that is not square was stretched to a square",
}

USE_WITH_SHIPPED_CODE = """\
With the code of this repository ({files}), on any machine that has diffusers:

```python
{example}
```

{methods}

`trust_remote_code=True` means that the {number} Python files run on your machine with your rights: read them first.
The network alone is `AutoModel.from_pretrained("{name}", subfolder="unet", trust_remote_code=True)`."""

METHODS = """\
The pipeline also has the methods `interpolate`, `invert`, `inpaint`, `variations` and `denoising_strip`, and in
continuous time `encode`, `decode`, `impute` and `colorize`."""
SDE_METHODS = """\
The pipeline also has the methods `interpolate`, `denoising_strip`, `encode`, `decode`, `impute` and `colorize`."""

PINNED = """\
A name on the Hub stands for whatever was pushed last. `revision` pins code and weights to the commit whose files you
have read; the page "Files and versions" lists the commits, and this asks for the newest:

```python
from huggingface_hub import HfApi

commit = HfApi().model_info("{name}").sha
pipe = DiffusionPipeline.from_pretrained("{name}", revision=commit, trust_remote_code=True)
```"""

USE_WITHOUT_CODE = """\
Without any code but that of diffusers:

```python
from diffusers import {pipeline}, {scheduler}, UNet2DModel

pipe = {pipeline}(
    UNet2DModel.from_pretrained("{name}", subfolder="unet", use_safetensors=True),
    {scheduler}.from_pretrained("{name}", subfolder="scheduler"),
)
```"""

USE_WEIGHTS_ALONE = """\
Without any code but that of diffusers, the weights load and nothing else does: {reason}

```python
from diffusers import UNet2DModel

unet = UNet2DModel.from_pretrained("{name}", subfolder="unet", use_safetensors=True)
```"""

NO_STOCK_SDE = """\
diffusers has no pipeline that samples them. What the network is to be given, and what its output means, is
`preconditioning` in `scheduler/sde.py`: the predicted clean image is c_skip x + c_out unet(c_in x, c_noise)."""
STOCK_FLOW = """\
It draws what the sampler `flow_euler` draws. As the scheduler loads, diffusers warns that it ignores the settings of
the training; it needs none of them."""
NO_STOCK_CLASSES = "diffusers has no pipeline for a network of pixels and classes."

USE_IN_A_CLONE = """\
In a clone of the code that trained it, which also runs nothing from this repository:

```python
from pipelines import CustomUNetPipeline

pipe = CustomUNetPipeline.from_pretrained("{name}")
```"""

# What an SDE model was trained with, by its objective; the numbers are those of its scheduler
OBJECTIVES = {
    "vp": "the variance-preserving SDE (VP; Song et al. 2021) dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw, beta(t)"
    " from {beta_min:g} to {beta_max:g} at times t from 0 to 1",
    "subvp": "the sub-VP SDE (Song et al. 2021), which has the drift of the variance-preserving SDE and less noise,"
    " beta(t) from {beta_min:g} to {beta_max:g} at times t from 0 to 1",
    "ve": "the variance-exploding SDE (VE; Song et al. 2021), noise levels from {sigma_min:g} to {sigma_max:g} for"
    " images in [-1, 1]",
    "edm": "the process of EDM (Karras et al. 2022), noise levels from {sigma_min:g} to {sigma_max:g} for images in"
    " [-1, 1]",
    "flow": "rectified flow (Liu et al. 2022), the straight paths x_t = (1 - t) x_0 + t epsilon from an image x_0 at"
    " time 0 to noise epsilon at time 1",
}

CONTINUOUS_SAMPLERS = """\
| sampler | method | network evaluations of N steps |
|---|---|---|
| `edm_heun`, as loaded | Heun's method on the probability-flow ODE; random with `churn`, 10 for VE | 2N - 1 |
| `ode` | Dormand-Prince on the probability-flow ODE to a `tolerance`; N is not used | as many as it takes |
| `euler_maruyama` | the reverse SDE by Euler-Maruyama | N + 1 |
| `reverse_diffusion` | the reverse SDE by the forward process's own steps | N + 1 |
| `predictor_corrector` | the same with Langevin steps (`snr`, `corrector_steps`) | 2N with one corrector step |
{flow_samplers}
They are those of Song et al. (arXiv 2011.13456), `edm_heun` that of Karras et al. (arXiv 2206.00364, algorithm 2)."""

FLOW_SAMPLERS = """\
| `flow_euler` | Euler's method on the straight flow, as diffusers' `FlowMatchEulerDiscreteScheduler` | N |
| `flow_heun` | Heun's method on the straight flow | 2N - 1 |
"""

LIMITATIONS = """\
The model draws what its training images have in common, at {resolution} pixels, and nothing can be asked for: no
prompt, no class, no attribute. Some images are deformed. It was trained on {num_images} images and may repeat some of
them nearly as they are; whether it does was not measured unless the results above say so."""

CLASS_LIMITATIONS = """\
The model draws what the training images of a class have in common, at {resolution} pixels, and nothing but the class
can be asked for. Not every image is of its class: guidance makes more of them so and all of them less varied. Some
images are deformed. It was trained on {num_images} images and may repeat some of
them nearly as they are; whether it does was not measured unless the results above say so."""

CELEBA_LIMITATIONS = """\
CelebA is a collection of photographs of celebrities found on the web, and the model inherits what that implies:

- **Who is in it.** Public figures, photographed at events, made up and lit for it. Young adults, light skin and smiles
  prevail, and so they do in what the model draws. Old people, children, dark skin, head coverings, scars and visible
  disabilities are rare, and can be expected to be drawn seldom and badly.
- **Its labels.** CelebA's annotators marked gender as one of two values and judged attractiveness, age and others by
  sight. {labels}
- **Real people.** The photographs were collected from the web; those whom they show were not asked. A generated face
  can resemble one of them, by chance or because an image was memorised.

Do not use it to identify anybody, to make a picture pass as a photograph of a real person, to decide anything about
people, or as a sample of how people look."""

CELEBA_WITHOUT_LABELS = """\
This model saw no labels, but statistics of its images that use them carry those judgements on."""
CELEBA_WITH_LABELS = "This model was trained with `{column}` and draws what they took it for."

SYNTHETIC_LIMITATIONS = """\
The training images are drawings of faces by a program, so the model knows the variety of that program and no real
face. It is meant for learning, tests and demonstrations."""

CELEBA_LICENCE = f"""\
CelebA's [agreement]({CELEBA_PAGE}) allows non-commercial research only and forbids to pass its images on. No image of
it is in this repository. These weights, and the images that they generate, are for non-commercial research as well.
The Python files are under the Apache License 2.0."""

SYNTHETIC_LICENCE = """\
The weights, the training images and the Python files are under the Apache License 2.0."""

UNKNOWN_LICENCE = """\
The Python files are under the Apache License 2.0. For the weights no licence is claimed here: what may be done with
them depends on the terms of the training images, which whoever shares this model has to add."""

CITATIONS = {
    "celeba": """\
@inproceedings{liu2015faceattributes,
  title = {Deep Learning Face Attributes in the Wild},
  author = {Liu, Ziwei and Luo, Ping and Wang, Xiaogang and Tang, Xiaoou},
  booktitle = {IEEE International Conference on Computer Vision (ICCV)},
  year = {2015}
}""",
    "ddpm": """\
@inproceedings{ho2020denoising,
  title = {Denoising Diffusion Probabilistic Models},
  author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {33},
  year = {2020}
}""",
    "unet": """\
@inproceedings{ronneberger2015unet,
  title = {{U-Net}: Convolutional Networks for Biomedical Image Segmentation},
  author = {Ronneberger, Olaf and Fischer, Philipp and Brox, Thomas},
  booktitle = {Medical Image Computing and Computer-Assisted Intervention (MICCAI)},
  year = {2015}
}""",
    "ddim": """\
@inproceedings{song2021denoising,
  title = {Denoising Diffusion Implicit Models},
  author = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}""",
    "v_prediction": """\
@inproceedings{salimans2022progressive,
  title = {Progressive Distillation for Fast Sampling of Diffusion Models},
  author = {Salimans, Tim and Ho, Jonathan},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}""",
    "score_sde": """\
@inproceedings{song2021scorebased,
  title = {Score-Based Generative Modeling through Stochastic Differential Equations},
  author = {Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P. and Kumar, Abhishek and Ermon, Stefano and
            Poole, Ben},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  note = {arXiv:2011.13456}
}""",
    "edm": """\
@inproceedings{karras2022elucidating,
  title = {Elucidating the Design Space of Diffusion-Based Generative Models},
  author = {Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {35},
  year = {2022},
  note = {arXiv:2206.00364}
}""",
    "flow": """\
@inproceedings{liu2023flow,
  title = {Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow},
  author = {Liu, Xingchao and Gong, Chengyue and Liu, Qiang},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2209.03003}
}

@inproceedings{lipman2023flow,
  title = {Flow Matching for Generative Modeling},
  author = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2210.02747}
}""",
    "logit_normal": """\
@inproceedings{esser2024scaling,
  title = {Scaling Rectified Flow Transformers for High-Resolution Image Synthesis},
  author = {Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and others},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  note = {arXiv:2403.03206}
}""",
    "likelihood_weighting": """\
@inproceedings{song2021maximum,
  title = {Maximum Likelihood Training of Score-Based Diffusion Models},
  author = {Song, Yang and Durkan, Conor and Murray, Iain and Ermon, Stefano},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {34},
  year = {2021}
}""",
    "guidance": """\
@misc{ho2022classifierfree,
  title = {Classifier-Free Diffusion Guidance},
  author = {Ho, Jonathan and Salimans, Tim},
  year = {2022},
  note = {arXiv:2207.12598}
}""",
    "min_snr": """\
@inproceedings{hang2023efficient,
  title = {Efficient Diffusion Training via Min-{SNR} Weighting Strategy},
  author = {Hang, Tiankai and Gu, Shuyang and Li, Chen and Bao, Jianmin and Chen, Dong and Hu, Han and Geng, Xin and
            Guo, Baining},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023}
}""",
    "post_hoc_ema": """\
@inproceedings{karras2024analyzing,
  title = {Analyzing and Improving the Training Dynamics of Diffusion Models},
  author = {Karras, Tero and Aittala, Miika and Lehtinen, Jaakko and Hellsten, Janne and Aila, Timo and Laine, Samuli},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2024}
}""",
    "soft_min_snr": """\
@inproceedings{crowson2024scalable,
  title = {Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers},
  author = {Crowson, Katherine and Baumann, Stefan Andreas and Birch, Alex and Abraham, Tanishq Mathew and Kaplan,
            Daniel Z. and Shippole, Enrico},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2024}
}""",
}
