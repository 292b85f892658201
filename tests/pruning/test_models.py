"""Models by name: the same structure every time, weights that fit or say why not."""

import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from idap.errors import InvalidInputError
from idap.models import ModelFactory, import_object, load_weights, resolve
from idap.models import resolve as resolve_function
from idap.quickstart import DigitsResNet
from idap.quickstart.network import WEIGHTS_FILE, load_network

DIGITS = "idap.quickstart:DigitsResNet"


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module into the current directory, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_a_function_of_the_package_and_its_factory():
    factory = resolve(DIGITS)
    assert factory == ModelFactory(DIGITS)
    assert not factory.is_library
    assert isinstance(factory(), DigitsResNet)
    again = pickle.loads(pickle.dumps(factory))
    assert again == factory
    assert eval(factory.code(), {"ModelFactory": ModelFactory}) == factory
    assert not factory.build().training


def test_torchvision_by_bare_and_by_full_name():
    pytest.importorskip("torchvision")
    for name in ("resnet18", "torchvision/resnet18"):
        factory = resolve(name, num_classes=7)
        assert factory.name == "torchvision/resnet18"
        assert factory().fc.out_features == 7
    assert factory.input_config()["size"] == 224
    assert factory.classes() == 1000
    assert eval(factory.code(), {"ModelFactory": ModelFactory}) == factory


def test_heads_that_only_training_reads_are_left_out():
    pytest.importorskip("torchvision")
    plain = resolve("googlenet", num_classes=3)()
    assert plain.aux1 is None
    assert not plain.transform_input
    assert resolve("googlenet", num_classes=3, pretrained=True)().transform_input


def test_vision_transformers_are_built_for_their_image_size():
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    model = resolve("timm/vit_tiny_patch16_224", num_classes=5, image_size=32)()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    # A convolutional network takes any size, and no such argument.
    assert resolve("timm/resnet18", num_classes=5, image_size=32)().num_classes == 5
    assert resolve("vit_b_32", num_classes=5, image_size=64)().image_size == 64
    assert timm.is_model("resnet50d")


def test_a_name_that_only_timm_has():
    timm = pytest.importorskip("timm")
    factory = resolve("resnet10t")
    assert factory.name == "timm/resnet10t"
    config, wanted = factory.input_config(), timm.data.resolve_model_data_config(factory())
    assert config["size"] == wanted["input_size"][-1]
    assert config["resize"] == int(config["size"] / wanted["crop_pct"])
    assert all(config[key] == wanted[key] for key in ("mean", "std", "interpolation"))
    assert factory.classes() == 1000


def test_architectures_of_the_paper_by_name():
    pytest.importorskip("transformers")
    for name in ("bert_base", "idap/bert_base"):
        factory = resolve(name, num_classes=7)
        assert factory.name == "idap/bert_base"
        assert (factory.is_library, factory.takes_classes, factory.has_weights) == (True, True, False)
    assert pickle.loads(pickle.dumps(factory)) == factory
    with torch.device("meta"):
        assert factory().classifier.out_features == 7
        assert resolve("bert_base")().classifier.out_features == 2
    # Those that a library builds are the library's, with its weights.
    assert resolve("idap/resnet50", num_classes=3) == resolve("resnet50", num_classes=3)
    assert resolve("idap/resnet50").name == "torchvision/resnet50"
    assert ModelFactory("idap/vit_b_16", num_classes=3, image_size=64)().heads.head.out_features == 3
    assert not resolve("gpt2_base").takes_classes
    with pytest.raises(InvalidInputError, match="idap/gpt2_base has no classifier"):
        resolve("gpt2_base", num_classes=3)()
    with pytest.raises(InvalidInputError, match="default weights"):
        resolve("bert_base").build("default")


def test_transformers_by_class():
    pytest.importorskip("transformers")
    for name in ("DistilBertForSequenceClassification", "transformers/DistilBertForSequenceClassification"):
        factory = resolve(name, num_classes=7)
        assert factory.name == "transformers/DistilBertForSequenceClassification"
    with torch.device("meta"):
        assert factory().classifier.out_features == 7
    assert resolve("ViTForImageClassification", image_size=64).image_size == 64
    for name in ("BertPreTrainedModel", "BertConfig", "transformers/bert_for_sequence_classification"):
        with pytest.raises(InvalidInputError, match="there is no model"):
            resolve(name)
    with pytest.raises(InvalidInputError, match="nearest: BertForSequenceClassification"):
        resolve("transformers/BertForSequenceClasification")
    with pytest.raises(InvalidInputError, match="default weights"):
        resolve("DistilBertForSequenceClassification").build("default")


def test_transformers_by_directory(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    saved = transformers.BertForSequenceClassification(config).eval()
    saved.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in ("./model", "transformers/model", str(tmp_path / "model")):
        factory = resolve(name)
        assert factory.name == f"transformers/{tmp_path / 'model'}"
    monkeypatch.chdir("/")
    assert factory.has_weights
    assert same(factory.build("default"), saved)
    assert not same(factory(), saved)
    other = resolve(str(tmp_path / "model"), num_classes=5).build("default")
    assert other.classifier.out_features == 5
    assert torch.equal(other.bert.pooler.dense.weight, saved.bert.pooler.dense.weight)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nothing that there is"}')
    with pytest.raises(InvalidInputError, match="cannot be built from its configuration"):
        factory()
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"holds a config\.json"):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert_bas", ("bert_base", "idap", "timm")),
        ("idap/yolo", ("in idap", "yolov4_shufflenet_v2")),
        ("resnt18", ("no model 'resnt18'", "resnet18", "package.module:function")),
        ("torchvision/resnet_18", ("torchvision", "resnet18")),
        ("no_such_package_anywhere:f", ("no_such_package_anywhere", "current directory")),
        ("idap.quickstart:DigitResNet", ("no 'DigitResNet'", "DigitsResNet")),
        ("idap.quickstart:", ("package.module:name",)),
    ],
)
def test_unknown_names(name, words):
    pytest.importorskip("torchvision")
    with pytest.raises(InvalidInputError) as caught:
        resolve(name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_names_that_begin_alike_come_first():
    from idap.models.resolve import suggest

    names = ["bit_tiny", "vit_tiny_patch16_224", "vit_tiny_patch16_384", "vi_tiny"]
    assert suggest("vit_tiny", names).startswith(
        "; the nearest: vit_tiny_patch16_224, vit_tiny_patch16_384, "
    )
    assert suggest("", names) == ""


def test_a_missing_library_says_what_to_install(monkeypatch):
    for name in ("timm/resnet18", "transformers/BertModel"):
        library = name.partition("/")[0]
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(InvalidInputError, match=f"pip install {library}"):
            resolve(name)
    with pytest.raises(InvalidInputError, match="pip install transformers"):
        resolve("bert_base")()


def test_factories_that_are_none(own_module):
    own_module(
        "own_models",
        "from torch import nn\n"
        "def net(num_classes=4): return nn.Linear(3, num_classes)\n"
        "def needy(width): return nn.Linear(width, 2)\n"
        "def fixed(): return nn.Linear(3, 2)\n"
        "def wrong(): return 5\n"
        "ready = nn.Linear(3, 2)\n"
        "number = 5\n",
    )
    assert resolve("own_models:net", num_classes=9)().out_features == 9
    assert resolve("own_models:net")().out_features == 4
    for name, options, message in (
        ("needy", {}, "width"),
        ("fixed", {"num_classes": 3}, "num_classes"),
        ("wrong", {}, "int"),
        ("ready", {}, "fresh model"),
        ("number", {}, "int"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            resolve(f"own_models:{name}", **options)()


def test_a_module_whose_import_fails_says_why(own_module):
    own_module("own_broken", "import a_library_that_is_not_there\n")
    with pytest.raises(InvalidInputError, match="a_library_that_is_not_there"):
        import_object("own_broken:f", "model")


@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped", "parallel"])
def test_weights_from_a_file(form, tmp_path):
    state = load_network().state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if form == "parallel" else state, path)
    assert same(resolve(DIGITS).build(path), load_network())


def test_weights_that_do_not_fit_name_the_keys(tmp_path):
    state = load_network().state_dict()
    before = DigitsResNet()
    unchanged = {key: value.clone() for key, value in before.state_dict().items()}
    state["head.weight"] = state["head.weight"][:5]
    torch.save(state, tmp_path / "shape.pt")
    with pytest.raises(
        InvalidInputError, match=r"1 have another shape: head.weight \(5, 64\) instead of \(10, 64\)"
    ):
        load_weights(before, tmp_path / "shape.pt")
    torch.save({"a.weight": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "keys.pt")
    with pytest.raises(InvalidInputError) as caught:
        load_weights(before, tmp_path / "keys.pt")
    assert "stem.0.weight" in str(caught.value)
    assert "2 are not in the model: a.weight, b" in str(caught.value)
    assert all(torch.equal(before.state_dict()[key], value) for key, value in unchanged.items())


def test_weights_that_are_none(tmp_path):
    model = DigitsResNet()
    (tmp_path / "text.pt").write_text("words")
    (tmp_path / "text.safetensors").write_text("words")
    torch.save(model, tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (
        ("missing.pt", "no file"),
        ("text.pt", "plain weights"),
        ("text.safetensors", "safetensors"),
        ("module.pt", "state_dict"),
        ("list.pt", "list"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            load_weights(model, tmp_path / name)
    with pytest.raises(InvalidInputError, match="default"):
        resolve(DIGITS).build("default")


def test_default_weights_keep_all_but_a_new_classifier(monkeypatch):
    """With the download in place of the network: what fits is loaded, a classifier of other classes stays new."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    pretrained = models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda self, **options: dict(pretrained))
    assert same(resolve("resnet18").build("default"), resolve_and_load(pretrained))
    fine = resolve("resnet18", num_classes=5).build("default")
    assert fine.fc.out_features == 5
    own = fine.state_dict()
    assert all(torch.equal(own[key], pretrained[key]) for key in own if not key.startswith("fc."))


def resolve_and_load(state):
    model = resolve_function("resnet18")()
    model.load_state_dict(state)
    return model


def test_default_weights_without_a_network(monkeypatch):
    models = pytest.importorskip("torchvision").models

    def unreachable(self, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(InvalidInputError, match=r"Name or service not known.*--weights"):
        resolve("resnet18").build("default")


def test_embedded_weights_fit_their_network():
    assert same(resolve(DIGITS).build(WEIGHTS_FILE), load_network())
