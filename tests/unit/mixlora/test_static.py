"""A plain LoRA beside the mixture, on the projector's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.loss import supervised_logits, supervised_loss
from qmixlora.mixlora import StaticLinear
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_run, open_session, with_adapter


@pytest.fixture
def session(make_recipe: Callable[..., Recipe]) -> TunedSession:
    """A fresh adapter in bfloat16, with factors on the projector."""
    return open_session(make_recipe(model={"dtype": "bfloat16"}, adapter={"projector": "lora"}), [])


def static_layers(session: TunedSession) -> list[StaticLinear]:
    return [module for module in session.model.modules() if isinstance(module, StaticLinear)]


def test_an_update_is_the_product_of_two_factors_and_the_weight(session: TunedSession) -> None:
    layer = static_layers(session)[0].float().eval()
    config = layer.mixlora_config["default"]
    x = torch.randn(5, layer.in_features)
    assert torch.equal(layer(x), layer.base_layer(x))  # a fresh one changes nothing
    nn.init.normal_(layer.mixlora_B["default"])
    update = config.alpha / config.r * layer.mixlora_B["default"].T @ layer.mixlora_A["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ update.T, rtol=1e-4, atol=1e-4)


def test_factors_on_the_projector_learn_in_fp32_and_route_nothing(session: TunedSession, data: Path) -> None:
    layers = static_layers(session)
    assert len(layers) == len(session.anatomy.projector_targets) == 2
    for parameter in (p for layer in layers for p in layer.mixlora_B.values()):
        nn.init.normal_(parameter, std=0.1)
    rows = load_conversations(str(data / "train.json"))
    supervised_loss(session.model.train(), session.collator([rows[0], rows[1]])).backward()
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.dtype == torch.float32 and p.grad.any() for p in trained)
    assert not any("modules_to_save" in name for name, _ in session.model.named_parameters())
    assert len(session.model.base_model.last_selection()) == len(session.anatomy.targets)


def test_a_saved_adapter_loads_with_its_projector(session: TunedSession, data: Path, tmp_path: Path) -> None:
    for name, parameter in session.model.named_parameters():
        if "mixlora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    session.model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "recipe.yaml").write_text(session.recipe.to_yaml())
    batch = session.collator([load_conversations(str(data / "train.json"))[0]])
    again = open_run(tmp_path)
    assert again.model.peft_config["default"].static_modules == [*session.anatomy.projector_targets]
    with torch.no_grad():
        assert torch.equal(supervised_logits(again.model, batch), supervised_logits(session.model.eval(), batch))


def test_unloading_gives_the_projector_back(session: TunedSession) -> None:
    with pytest.raises(NotImplementedError, match="qmixlora export"):
        static_layers(session)[0].merge()
    before = session.backbone.model.multi_modal_projector.linear_1.base_layer
    whole = with_adapter(session, session.recipe.adapter, session.model.peft_config["default"])
    assert whole.backbone.model.multi_modal_projector.linear_1.base_layer is before


def test_a_projector_without_linear_layers_is_refused_by_name(
    make_recipe: Callable[..., Recipe], tmp_path: Any
) -> None:
    from tests.families.case import Case
    from tests.families.test_families import VARIANTS

    case = Case(VARIANTS["gemma3"], tmp_path)
    with pytest.raises(
        UserError, match=r"projector of this model has no linear layer[\s\S]*projector: full, or frozen"
    ):
        open_session(case.recipe(adapter={"projector": "lora"}), [])
