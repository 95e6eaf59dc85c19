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

LIMITATIONS = """\
The model draws what its training images have in common, at {resolution} pixels, and nothing can be asked for: no
prompt, no class, no attribute. Some images are deformed. It was trained on {num_images} images and may repeat some of
them nearly as they are; whether it does was not measured unless the results above say so."""

CELEBA_LIMITATIONS = """\
CelebA is a collection of photographs of celebrities found on the web, and the model inherits what that implies:

- **Who is in it.** Public figures, photographed at events, made up and lit for it. Young adults, light skin and smiles
  prevail, and so they do in what the model draws. Old people, children, dark skin, head coverings, scars and visible
  disabilities are rare, and can be expected to be drawn seldom and badly.
- **Its labels.** CelebA's annotators marked gender as one of two values and judged attractiveness, age and others by
  sight. This model saw no labels, but statistics of its images that use them carry those judgements on.
- **Real people.** The photographs were collected from the web; those whom they show were not asked. A generated face
  can resemble one of them, by chance or because an image was memorised.

Do not use it to identify anybody, to make a picture pass as a photograph of a real person, to decide anything about
people, or as a sample of how people look."""

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
    "min_snr": """\
@inproceedings{hang2023efficient,
  title = {Efficient Diffusion Training via Min-{SNR} Weighting Strategy},
  author = {Hang, Tiankai and Gu, Shuyang and Li, Chen and Bao, Jianmin and Chen, Dong and Hu, Han and Geng, Xin and
            Guo, Baining},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023}
}""",
}
