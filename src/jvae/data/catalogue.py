"""The datasets that `load` knows by name: their files, how those are read, and their terms."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvae.data import raw_formats
from jvae.data.dataset import DataError, hold_out

# From a name of `Dataset` to that of tensorflow-datasets.
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class RawFile(NamedTuple):
    """A file as its authors publish it.

    Attributes:
      name: the file's own name.
      url: where it is published.
      sha256: the SHA-256 of the file, several where mirrors differ in the gzip header; none where
        nobody published one, and then the file is never downloaded.
    """

    name: str
    url: str
    sha256: tuple[str, ...]


class Split(NamedTuple):
    """A part of a dataset as records, which are made one at a time.

    Attributes:
      num: how many records there are.
      records: mappings with "image", uint8 [height, width] or [height, width, channels] or the
        bytes of an encoded image, and the dataset's other features.
    """

    num: int
    records: Iterable[Mapping[str, Any]]


def _same(image: np.ndarray) -> np.ndarray:
    return image


def _count(split: str, counts: Mapping[str, int]) -> list[int]:
    return list(range(counts[split]))


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset by name.

    Attributes:
      name: as `load` takes it.
      prepared_name: its name in tensorflow-datasets: `name`, unless that is other data there.
      version: of tensorflow-datasets' builder, or of ours where it has none.
      data_shape: of one example of the `Dataset`.
      files: the raw files.
      splits: reads the raw files, by name, into parts: "train", "test" and perhaps "valid".
      features: from the module `tensorflow_datasets` to the features of a record, those of its
        own builder where it has one.
      licence: the terms the data is under.
      citation: BibTeX.
      homepage: where the data is described.
      image: from the image of a record, uint8 as stored, to the example, uint8 `data_shape`.
      keys: from a part and the sizes of all to the key of each record, in order. Builders of
        tensorflow-datasets shuffle records by the hash of their key.
      has_labels: whether a record has a "label".
      content_sha256: of the decoded `Dataset`, where known; no other content is accepted.
    """

    name: str
    version: str
    data_shape: tuple[int, ...]
    files: tuple[RawFile, ...]
    splits: Callable[[Mapping[str, Path]], Mapping[str, Split]]
    features: Callable[[Any], Mapping[str, Any]]
    licence: str
    citation: str
    homepage: str
    prepared_name: str = ""
    image: Callable[[np.ndarray], np.ndarray] = _same
    keys: Callable[[str, Mapping[str, int]], list[Any]] = _count
    has_labels: bool = True
    content_sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.prepared_name:
            object.__setattr__(self, "prepared_name", self.name)


def _records(images: np.ndarray, **columns: Iterable[Any]) -> Split:
    names = ["image", *columns]
    rows = zip(images, *columns.values(), strict=True)
    return Split(len(images), (dict(zip(names, row, strict=True)) for row in rows))


# MNIST and its kin: four gzipped IDX files of the same names.

_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_files(url: str, *sha256: tuple[str, ...]) -> tuple[RawFile, ...]:
    pairs = zip(_IDX_FILES, sha256, strict=True)
    return tuple(RawFile(name, url + name, digests) for name, digests in pairs)


def _idx_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    paths = iter(files[name] for name in _IDX_FILES)
    splits = {}
    for part, images_path, labels_path in zip(("train", "test"), paths, paths, strict=True):
        images = raw_formats.read_idx(images_path, ndim=3)
        labels = raw_formats.read_idx(labels_path, ndim=1)
        if images.shape[1:] != (28, 28):
            raise DataError(f"{images_path}: images of {images.shape[1:]}, expected (28, 28)")
        if len(images) != len(labels):
            raise DataError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
        splits[part] = _records(images, label=labels)
    return splits


def _digit_features(tfds: Any) -> dict[str, Any]:
    return {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }


def _class_features(*names: str) -> Callable[[Any], dict[str, Any]]:
    def features(tfds: Any) -> dict[str, Any]:
        return _digit_features(tfds) | {"label": tfds.features.ClassLabel(names=list(names))}

    return features


MNIST = Source(
    name="mnist",
    version="3.0.1",
    data_shape=(28, 28),
    files=_idx_files(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        # The mirror's file and that of the first host: the same images, gzipped anew.
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "12bacf187eba4f770a04d97be5dbaad9289fe5d89a89729b6af3255c8bbfa9e1",
        ),
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",),
        (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "c99a2fc9c8f7934dac9481251fc235227437fdcccfb8de53efcb767a8c3b057e",
        ),
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",),
    ),
    splits=_idx_splits,
    features=_digit_features,
    licence="CC BY-SA 3.0 (LeCun, Cortes and Burges)",
    citation="@misc{mnist, author={LeCun, Yann and Cortes, Corinna and Burges, Christopher J. C.}, "
    "title={The {MNIST} database of handwritten digits}, year={1998}}",
    homepage="http://yann.lecun.com/exdb/mnist/",
    content_sha256="af0453f450034686886fcc93115c429dc0e14fbe74b042870e08b758f49fc19f",
)

FASHION_MNIST = Source(
    name="fashion_mnist",
    version="3.0.1",
    data_shape=(28, 28),
    files=_idx_files(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",),
        ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",),
        ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",),
        ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",),
    ),
    splits=_idx_splits,
    features=_class_features(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    licence="MIT (Zalando)",
    citation="@misc{fashion_mnist, author={Xiao, Han and Rasul, Kashif and Vollgraf, Roland}, "
    "title={Fashion-{MNIST}: a novel image dataset for benchmarking machine learning "
    "algorithms}, year={2017}, eprint={1708.07747}}",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
)

KMNIST = Source(
    name="kmnist",
    version="3.0.1",
    data_shape=(28, 28),
    files=_idx_files(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ("51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",),
        ("e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",),
        ("edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",),
        ("20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",),
    ),
    splits=_idx_splits,
    features=_class_features("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    licence="CC BY-SA 4.0 (CODH)",
    citation="@misc{kmnist, author={Clanuwat, Tarin and Bober-Irizar, Mikel and Kitamoto, Asanobu "
    "and Lamb, Alex and Yamamoto, Kazuaki and Ha, David}, title={Deep learning for classical "
    "{Japanese} literature}, year={2018}, eprint={1812.01718}}",
    homepage="http://codh.rois.ac.jp/kmnist/",
)


# Larochelle's fixed binarization of MNIST.


def _binarized_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    return {
        part: _records(
            raw_formats.read_amat(files[f"binarized_mnist_{part}.amat"], columns=784).reshape(
                -1, 28, 28
            )
        )
        for part in ("train", "valid", "test")
    }


def _white_is_255(image: np.ndarray) -> np.ndarray:
    return image * np.uint8(255)


_BINARIZED_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
BINARIZED_MNIST = Source(
    name="binarized_mnist",
    version="1.0.0",
    data_shape=(28, 28),
    files=tuple(
        RawFile(
            f"binarized_mnist_{part}.amat", f"{_BINARIZED_URL}binarized_mnist_{part}.amat", (h,)
        )
        for part, h in (
            ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
            ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
            ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
        )
    ),
    splits=_binarized_splits,
    features=lambda tfds: {"image": tfds.features.Image(shape=(28, 28, 1))},
    licence="as MNIST's, CC BY-SA 3.0",
    citation="@inproceedings{binarized_mnist, author={Salakhutdinov, Ruslan and Murray, Iain}, "
    "title={On the quantitative analysis of deep belief networks}, booktitle={ICML}, year={2008}}",
    homepage=_BINARIZED_URL,
    image=_white_is_255,
    has_labels=False,
)


# OMNIGLOT as Burda et al. (2016) cut and scaled it, which is not the omniglot of
# tensorflow-datasets: other images, 105×105.


def _omniglot_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    path = files["chardata.mat"]
    names = ("data", "target", "testdata", "testtarget")
    found = raw_formats.read_mat(path, names)
    splits = {}
    for part, num, images, labels in (
        ("train", 24_345, found["data"], found["target"]),
        ("test", 8_070, found["testdata"], found["testtarget"]),
    ):
        # No checksum is published: what can be held against the literature is.
        if images.shape != (784, num) or labels.shape != (50, num):
            raise DataError(
                f"{path}: {part} images {images.shape} and alphabets {labels.shape}, expected "
                f"(784, {num}) and (50, {num})"
            )
        if not (images.min() >= 0 and images.max() <= 1):
            raise DataError(
                f"{path}: {part} values {images.min()} to {images.max()}, expected 0 to 1"
            )
        # To 8 bits, as all images here: off by 1/510 at most.
        pixels = np.round(255 * images.T).astype(np.uint8)
        # MATLAB's columns come first.
        upright = pixels.reshape(-1, 28, 28).transpose(0, 2, 1)
        splits[part] = _records(upright, label=labels.argmax(axis=0))
    return splits


def _omniglot_features(tfds: Any) -> dict[str, Any]:
    return _digit_features(tfds) | {"label": tfds.features.ClassLabel(num_classes=50)}


OMNIGLOT = Source(
    name="omniglot",
    prepared_name="omniglot_28x28",
    version="1.0.0",
    data_shape=(28, 28),
    files=(
        RawFile(
            "chardata.mat",
            "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
            (),
        ),
    ),
    splits=_omniglot_splits,
    features=_omniglot_features,
    licence="MIT (Lake); cut and scaled by Burda et al. (2016)",
    citation="@article{omniglot, author={Lake, Brenden M. and Salakhutdinov, Ruslan and "
    "Tenenbaum, Joshua B.}, title={Human-level concept learning through probabilistic program "
    "induction}, journal={Science}, volume={350}, pages={1332--1338}, year={2015}}",
    homepage="https://github.com/brendenlake/omniglot",
)


# Frey Face: 1,965 frames of a film, with no split of their own. Split at random, as later work
# does: a test frame has neighbours in the training part.


def _frey_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    path = files["frey_rawface.mat"]
    faces = raw_formats.read_mat(path, ("ff",))["ff"]
    if faces.dtype != np.uint8 or faces.ndim != 2 or faces.shape[0] != 560:
        raise DataError(f"{path}: 'ff' is {faces.dtype} {faces.shape}, expected uint8 (560, 1965)")
    images = faces.T.reshape(-1, 28, 20)
    # The sizes of later work: 1,565, 200 and 200. Which frames is ours, seeded.
    rest, test = hold_out(len(images), 200 / 1965, seed=0)
    train, valid = (rest[part] for part in hold_out(len(rest), 200 / 1765, seed=1))
    return {
        part: _records(images[which])
        for part, which in (("train", train), ("valid", valid), ("test", test))
    }


FREY_FACE = Source(
    name="frey_face",
    version="1.0.0",
    data_shape=(28, 20),
    files=(
        RawFile(
            "frey_rawface.mat",
            "https://cs.nyu.edu/~roweis/data/frey_rawface.mat",
            ("831f3370e2d5ea86c7d38cd3bcef6974d3071cee5c1a7e2f1a7cb75cd7be5e96",),
        ),
    ),
    splits=_frey_splits,
    features=lambda tfds: {"image": tfds.features.Image(shape=(28, 20, 1))},
    licence="none stated (courtesy of Brendan Frey)",
    citation="@inproceedings{frey_face, author={Frey, Brendan J. and Colmenarez, Antonio and "
    "Huang, Thomas S.}, title={Mixtures of local linear subspaces for face recognition}, "
    "booktitle={CVPR}, year={1998}}",
    homepage="https://cs.nyu.edu/~roweis/data.html",
    has_labels=False,
    content_sha256="6d4b16b7fc0da43c59f42187373106d7b3d21500378cf822a054de3f176d8208",
)


# Colour.


def _cifar10_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    arrays = raw_formats.read_cifar10(files["cifar-10-binary.tar.gz"])
    return {
        part: _records(
            arrays[part],
            label=arrays[f"{part}_labels"],
            id=[f"{part}_{i:05d}" for i in range(len(arrays[part]))],
        )
        for part in ("train", "test")
    }


def _cifar10_features(tfds: Any) -> dict[str, Any]:
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    return {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=names),
    }


CIFAR10 = Source(
    name="cifar10",
    version="3.0.2",
    data_shape=(32, 32, 3),
    files=(
        RawFile(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            ("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",),
        ),
    ),
    splits=_cifar10_splits,
    features=_cifar10_features,
    licence="none stated",
    citation="@techreport{cifar10, author={Krizhevsky, Alex}, title={Learning multiple layers of "
    "features from tiny images}, institution={University of Toronto}, year={2009}}",
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
)


def _svhn_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    splits = {}
    for part in ("train", "test"):
        path = files[f"{part}_32x32.mat"]
        found = raw_formats.read_mat(path, ("X", "y"))
        images, labels = found["X"], found["y"].reshape(-1)
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
            raise DataError(
                f"{path}: 'X' is {images.dtype} {images.shape}, expected uint8 "
                f"(32, 32, 3, {len(labels)})"
            )
        splits[part] = _records(
            np.moveaxis(images, -1, 0),
            label=labels % 10,  # the digit 0 is stored as 10
            id=[f"{part}_{i:06d}" for i in range(len(labels))],
        )
    return splits


def _svhn_features(tfds: Any) -> dict[str, Any]:
    return {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }


_SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
SVHN_CROPPED = Source(
    name="svhn_cropped",
    version="3.1.0",
    data_shape=(32, 32, 3),
    files=(
        RawFile(
            "train_32x32.mat",
            f"{_SVHN_URL}train_32x32.mat",
            ("435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",),
        ),
        RawFile(
            "test_32x32.mat",
            f"{_SVHN_URL}test_32x32.mat",
            ("cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",),
        ),
    ),
    splits=_svhn_splits,
    features=_svhn_features,
    licence="non-commercial use only",
    citation="@inproceedings{svhn, author={Netzer, Yuval and Wang, Tao and Coates, Adam and "
    "Bissacco, Alessandro and Wu, Bo and Ng, Andrew Y.}, title={Reading digits in natural images "
    "with unsupervised feature learning}, booktitle={NIPS workshop}, year={2011}}",
    homepage=_SVHN_URL,
)


_LANDMARKS = tuple(
    f"{part}_{axis}"
    for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
    for axis in "xy"
)


def _celeb_a_splits(files: Mapping[str, Path]) -> dict[str, Split]:
    _, partition = raw_formats.read_celeb_a_table(files["list_eval_partition.txt"], header=False)
    attribute_names, attributes = raw_formats.read_celeb_a_table(
        files["list_attr_celeba.txt"], header=True
    )
    landmark_names, landmarks = raw_formats.read_celeb_a_table(
        files["list_landmarks_align_celeba.txt"], header=True
    )
    _, identity = raw_formats.read_celeb_a_table(files["identity_CelebA.txt"], header=False)

    def records(names: list[str]) -> Iterable[dict[str, Any]]:
        members = [f"img_align_celeba/{name}" for name in names]
        jpegs = raw_formats.read_zip_members(
            files["img_align_celeba.zip"], members, max_bytes=1 << 20
        )
        for name, jpeg in zip(names, jpegs, strict=True):
            try:
                yield {
                    "image": jpeg,
                    "attributes": {
                        key: value > 0
                        for key, value in zip(attribute_names, attributes[name], strict=True)
                    },
                    "landmarks": dict(zip(landmark_names, landmarks[name], strict=True)),
                    "identity": {"Identity_No": identity[name][0]},
                }
            except KeyError as error:
                raise DataError(f"{name} is missing in one of CelebA's tables") from error

    splits = {}
    for number, part in enumerate(("train", "valid", "test")):
        names = sorted(name for name, (which, *_) in partition.items() if which == number)
        splits[part] = Split(len(names), records(names))
    return splits


def _celeb_a_features(tfds: Any) -> dict[str, Any]:
    attributes = (
        "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose "
        "Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses "
        "Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache "
        "Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
        "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick "
        "Wearing_Necklace Wearing_Necktie Young"
    )
    return {
        "image": tfds.features.Image(shape=(218, 178, 3), encoding_format="jpeg"),
        "attributes": dict.fromkeys(attributes.split(), np.bool_),
        "landmarks": dict.fromkeys(_LANDMARKS, np.int64),
        "identity": {"Identity_No": np.int64},
    }


def _celeb_a_image(image: np.ndarray) -> np.ndarray:
    """The central 148×148 pixels, averaged down to 64×64."""
    from PIL import Image

    top, left = (218 - 148) // 2, (178 - 148) // 2
    crop = Image.fromarray(image[top : top + 148, left : left + 148])
    return np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR))


def _celeb_a_keys(split: str, counts: Mapping[str, int]) -> list[str]:
    """The file names: numbers from 1 through the parts in this order."""
    start = 1
    for part in ("train", "valid", "test"):
        if part == split:
            break
        start += counts[part]
    return [f"{i:06d}.jpg" for i in range(start, start + counts[split])]


_DRIVE = "https://drive.google.com/uc?export=download&confirm=t&id="
CELEB_A = Source(
    name="celeb_a",
    version="2.1.0",
    data_shape=(64, 64, 3),
    files=(
        RawFile(
            "img_align_celeba.zip",
            f"{_DRIVE}0B7EVK8r0v71pZjFTYXZWM3FlRnM",
            ("46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74",),
        ),
        RawFile(
            "list_eval_partition.txt",
            f"{_DRIVE}0B7EVK8r0v71pY0NSMzRuSXJEVkk",
            ("fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7",),
        ),
        RawFile(
            "list_attr_celeba.txt",
            f"{_DRIVE}0B7EVK8r0v71pblRyaVFSWGxPY0U",
            ("f0e5da289d5ccf75ffe8811132694922b60f2af59256ed362afa03fefba324d0",),
        ),
        RawFile(
            "list_landmarks_align_celeba.txt",
            f"{_DRIVE}0B7EVK8r0v71pd0FJY3Blby1HUTQ",
            ("6c02a87569907f6db2ba99019085697596730e8129f67a3d61659f198c48d43b",),
        ),
        RawFile(
            "identity_CelebA.txt",
            f"{_DRIVE}1_ee_0u7vcNLOfNLegJRHmolfH5ICW-XS",
            ("c6143857c3e2630ac2da9f782e9c1232e5e59be993a9d44e8a7916c78a6158c0",),
        ),
    ),
    splits=_celeb_a_splits,
    features=_celeb_a_features,
    licence="non-commercial research only",
    citation="@inproceedings{celeb_a, author={Liu, Ziwei and Luo, Ping and Wang, Xiaogang and "
    "Tang, Xiaoou}, title={Deep learning face attributes in the wild}, booktitle={ICCV}, "
    "year={2015}}",
    homepage="http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    image=_celeb_a_image,
    keys=_celeb_a_keys,
    has_labels=False,
)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        MNIST,
        FASHION_MNIST,
        KMNIST,
        BINARIZED_MNIST,
        OMNIGLOT,
        FREY_FACE,
        CIFAR10,
        SVHN_CROPPED,
        CELEB_A,
    )
}
