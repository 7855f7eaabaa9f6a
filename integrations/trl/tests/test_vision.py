"""A vision-language model: image tokens are keys like any other, and weights are exact."""

import pytest
import tiny
import tokenweights as tw
import torch
from datasets import Dataset
from PIL import Image
from tokenweights import TokenWeightsError
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

SIDE, PATCH = 16, 8
IMAGES = (SIDE // PATCH) ** 2  # tokens of an image
QUESTIONS = ("1+2=", "10+23=?")
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def processor():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.padding_side = "left"
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token
    )


def policy():
    tokenizer = processor().tokenizer
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
        initializer_range=0.5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny.policy(3, vocab_size=len(tokenizer)).config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGES,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(3)
    return LlavaForConditionalGeneration(config)


def trainer(folder, recipe, **changes):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    rows = [
        {"prompt": [{"role": "user", "content": question}], "image": Image.fromarray(drawn.numpy())}
        for question, drawn in zip(QUESTIONS, pixels, strict=True)
    ]

    class Recorder(TokenWeightsGRPOTrainer):
        def _weighted(self, output, columns):
            self.plain, self.columns = output, columns
            self.made = super()._weighted(output, columns)
            return self.made

    arguments = tiny.arguments(TokenWeightsGRPOConfig, folder, recipe=recipe, **changes)
    return Recorder(
        policy(), tiny.reward, arguments, Dataset.from_list(rows), processing_class=processor()
    )


def test_weights_are_those_of_eager_attention_over_images_and_text(tmp_path):
    made = trainer(tmp_path, {"name": "low2high", "layers": (1,)}, max_steps=1)
    model = policy().double()
    made.train()
    assert made.score_source == "scoring_pass"
    output = made.plain
    model.set_attn_implementation("eager")
    ids, real = (
        torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1)
        for name in ("ids", "mask")
    )
    assert ((ids == model.config.image_token_index).sum(1) == IMAGES).all()
    mask, found = output["completion_mask"].bool(), made.columns["attention"][1]
    for row in range(len(ids)):
        seen, length = ids[row][real[row].bool()][None], int(mask[row].sum())
        with torch.no_grad():
            attentions = model(
                input_ids=seen,
                pixel_values=output["pixel_values"][row : row + 1].double(),
                output_attentions=True,
            ).attentions
        mean = attentions[1][0].mean(0)[-length - 1 : -1]
        reach = torch.arange(seen.shape[1] - length, seen.shape[1]).double()
        expected = -torch.special.xlogy(mean, mean).sum(-1) / reach.log()
        torch.testing.assert_close(found[row][:length].double(), expected, atol=1e-5, rtol=1e-5)
    batch = tw.RolloutBatch(
        mask=mask, attention={1: found}, advantages=output["advantages"][:, None]
    )
    weights = made.recipe.weighted(batch, step=0).weights
    torch.testing.assert_close(made.made["advantages"], weights * output["advantages"][:, None])


def test_the_gradient_probe_refuses_images(tmp_path):
    with pytest.raises(TokenWeightsError, match="expected `model` a text model"):
        trainer(tmp_path, "low2high", gradient_probe_steps=1)
