"""A small vision-language model without weights, for envs.Goals: `--vlm tests/goal_words.py:GoalWords`.

It sees where the light of an image is, and reads where a sentence says it is; both become a vector of nine receptive
fields on the room, in the same 32 dimensions. As in CLIP, images and texts have an offset of their own, and a sentence
says much that no image shows: a direction of its own, at random in all dimensions, the fields included. The cosine of a
sentence and the image that it describes is 0.3 to 0.6; images alone never leave the few dimensions of the fields."""
import re
import zlib

import numpy as np

DIM = 32
FIELDS = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
WORDS = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}


class GoalWords:
    dim = DIM

    def __init__(self):
        rng = np.random.default_rng(0)
        directions, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))  # of fields, images and texts, orthogonal
        self.fields, self.image_offset, self.text_offset = directions[:9], directions[9], directions[10]

    def embed(self, places: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """Places (n,2) in [-1, 1] and what does not depend on them (n or 1,32) -> unit vectors (n,32)."""
        distance = np.square(places[:, None] - FIELDS).sum(-1)
        fields = np.exp(-2 * distance)
        fields /= np.linalg.norm(fields, axis=-1, keepdims=True)
        x = fields @ self.fields + rest
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (n,Y,X,3) -> (n,32): the centre of the light."""
        light = frames.mean(-1) + 1e-6
        axis = np.linspace(-1, 1, frames.shape[1])
        total = light.sum((1, 2))
        x = (light.sum(1) * axis).sum(-1) / total
        y = (light.sum(2) * axis).sum(-1) / total
        return self.embed(np.stack([x, y], -1) * 16 / 11, 0.7 * self.image_offset)

    def embed_text(self, texts: list[str]) -> np.ndarray:
        """Sentences -> (n,32): the place that their words name."""
        places = np.zeros((len(texts), 2))
        own = np.zeros((len(texts), DIM))
        for place, direction, text in zip(places, own, texts):
            direction[:] = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIM)
            direction /= np.linalg.norm(direction)
            for word in re.findall(r"\w+", text.lower()):
                if word in WORDS:
                    axis, value = WORDS[word]
                    place[axis] = value
        return self.embed(places, 0.7 * self.text_offset + 1.5 * own)
