"use strict";
/* Gemma 3 in plain JavaScript: one token in, the scores of every next token out.

   The names are those of the checkpoint (layers.0.self_attn.q_proj), and the order of the steps is the model's own:

     x = embedding * sqrt(width)
     in every block:   x += norm(attention(norm(x)))        each norm is an RMSNorm whose gain is 1 + w
                       x += norm(mlp(norm(x)))
     scores = embedding . norm(x)                           the embedding serves twice ("tied")

   Weights are float32, as they are stored; sums are taken in float64, which JavaScript has anyway. */

const Gemma = (() => {
  const numbers = (base64, Kind = Float32Array) => {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    return new Kind(bytes.buffer);
  };

  /** Cut one long array into named matrices; shapes: [[name, [rows, columns]], ...] in the order in which they lie. */
  function unpack(flat, shapes) {
    const found = {};
    let at = 0;
    for (const [name, shape] of shapes) {
      const size = shape.reduce((a, b) => a * b, 1);
      found[name] = flat.subarray(at, at += size);
    }
    return found;
  }

  /** y = W x, where W has a row for each number of y. Four sums at once, since one would wait for itself. */
  function times(W, x, y) {
    const n = x.length;
    for (let row = 0, at = 0; row < y.length; row++, at += n) {
      let a = 0, b = 0, c = 0, d = 0, i = 0;
      for (; i + 3 < n; i += 4) {
        a += W[at + i] * x[i];
        b += W[at + i + 1] * x[i + 1];
        c += W[at + i + 2] * x[i + 2];
        d += W[at + i + 3] * x[i + 3];
      }
      for (; i < n; i++) a += W[at + i] * x[i];
      y[row] = a + b + (c + d);
    }
    return y;
  }

  /** RMSNorm of x[from ... from + w.length), into y at the same place: x / sqrt(mean(x^2) + eps) * (1 + w). */
  function norm(x, w, eps, y, from = 0) {
    let squares = 0;
    for (let i = 0; i < w.length; i++) squares += x[from + i] * x[from + i];
    const scale = 1 / Math.sqrt(squares / w.length + eps);
    for (let i = 0; i < w.length; i++) y[from + i] = x[from + i] * scale * (1 + w[i]);
    return y;
  }

  /** GELU in its tanh form, which gates the MLP. */
  const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));

  /** Rotary positions: within each head, number i and number i + half turn by an angle that grows with the position. */
  function rotate(x, heads, size, position, frequencies) {
    const half = size / 2;
    for (let h = 0; h < heads; h++) {
      for (let i = 0; i < half; i++) {
        const angle = position * frequencies[i], cos = Math.cos(angle), sin = Math.sin(angle);
        const at = h * size + i, one = x[at], other = x[at + half];
        x[at] = one * cos - other * sin;
        x[at + half] = other * cos + one * sin;
      }
    }
  }

  /** The angles a head turns by per position: local (sliding) attention has a base of its own, and global may be stretched. */
  function frequencies(rope, size) {
    const stretched = rope.rope_type === "linear" ? rope.factor : 1;
    return Float64Array.from({length: size / 2}, (_, i) => 1 / rope.rope_theta ** (2 * i / size) / stretched);
  }

  /** What a model has read so far: the keys and values of every block, to which each token adds its own. */
  class Reader {
    constructor(config, weights) {
      const c = this.config = config, w = this.weights = weights;
      this.position = 0;
      this.keys = c.layer_types.map(() => []);
      this.values = c.layer_types.map(() => []);
      this.turns = {};
      for (const [kind, rope] of Object.entries(c.rope_parameters)) this.turns[kind] = frequencies(rope, c.head_dim);
      this.blocks = c.layer_types.map((kind, l) => ({
        kind, of: (name) => w[`layers.${l}.${name}`],
        window: kind === "sliding_attention" ? c.sliding_window : Infinity,
      }));
      const wide = (n) => new Float64Array(n);
      this.room = {
        h: wide(c.hidden_size), q: wide(c.num_attention_heads * c.head_dim), mixed: wide(c.num_attention_heads * c.head_dim),
        gate: wide(c.intermediate_size), up: wide(c.intermediate_size), out: wide(c.hidden_size),
      };
    }

    /** Read one token; returns the scores of every next one. */
    read(token) {
      const c = this.config, d = c.hidden_size, E = this.weights.embed_tokens, x = new Float64Array(d);
      for (let i = 0; i < d; i++) x[i] = E[token * d + i] * Math.sqrt(d);
      this.blocks.forEach((block, l) => {
        this.add(x, this.attention(block, l, this.normed(x, block.of("input_layernorm"))), block.of("post_attention_layernorm"));
        this.add(x, this.mlp(block, this.normed(x, block.of("pre_feedforward_layernorm"))), block.of("post_feedforward_layernorm"));
      });
      this.position++;
      const scores = times(E, this.normed(x, this.weights.norm), new Float64Array(c.vocab_size)), cap = c.final_logit_softcapping;
      return cap ? scores.map((s) => cap * Math.tanh(s / cap)) : scores;
    }

    normed(x, w) {
      return norm(x, w, this.config.rms_norm_eps, this.room.h);
    }

    /** x += norm(y) */
    add(x, y, w) {
      norm(y, w, this.config.rms_norm_eps, y);
      for (let i = 0; i < x.length; i++) x[i] += y[i];
    }

    attention(block, l, h) {
      const c = this.config, size = c.head_dim, {q, mixed, out} = this.room, turns = this.turns[block.kind];
      const k = new Float64Array(c.num_key_value_heads * size), v = new Float64Array(k.length);
      times(block.of("self_attn.q_proj"), h, q);
      times(block.of("self_attn.k_proj"), h, k);
      times(block.of("self_attn.v_proj"), h, v);
      for (const [x, name] of [[q, "q_norm"], [k, "k_norm"]]) {
        for (let from = 0; from < x.length; from += size) norm(x, block.of(`self_attn.${name}`), c.rms_norm_eps, x, from);
        rotate(x, x.length / size, size, this.position, turns);
      }
      const keys = this.keys[l], values = this.values[l];
      keys.push(k);
      values.push(v);
      const first = Math.max(0, this.position + 1 - block.window), group = c.num_attention_heads / c.num_key_value_heads;
      const scale = c.query_pre_attn_scalar ** -0.5, weight = new Float64Array(keys.length);
      mixed.fill(0);
      for (let head = 0; head < c.num_attention_heads; head++) {
        const from = head * size, there = Math.floor(head / group) * size;
        let top = -Infinity, sum = 0;
        for (let t = first; t < keys.length; t++) {
          let dot = 0;
          for (let i = 0; i < size; i++) dot += q[from + i] * keys[t][there + i];
          weight[t] = dot * scale;
          top = Math.max(top, weight[t]);
        }
        for (let t = first; t < keys.length; t++) sum += weight[t] = Math.exp(weight[t] - top);
        for (let t = first; t < keys.length; t++) {
          const share = weight[t] / sum, value = values[t];
          for (let i = 0; i < size; i++) mixed[from + i] += share * value[there + i];
        }
      }
      return times(block.of("self_attn.o_proj"), mixed, out);
    }

    mlp(block, h) {
      const {gate, up, out} = this.room;
      times(block.of("mlp.gate_proj"), h, gate);
      times(block.of("mlp.up_proj"), h, up);
      for (let i = 0; i < gate.length; i++) gate[i] = gelu(gate[i]) * up[i];
      return times(block.of("mlp.down_proj"), gate, out);
    }
  }

  /** The weights of an edit: alpha times the vector is added to the matrices of some layers, in float32, as PyTorch does it. */
  function edited(weights, vector, layers, alpha) {
    const found = {...weights}, a = Math.fround(alpha);
    if (!alpha) return found;
    for (const [name, delta] of Object.entries(vector)) {
      if (!layers.includes(Number(name.split(".")[1]))) continue;
      const before = weights[name], after = new Float32Array(before.length);
      for (let i = 0; i < after.length; i++) after[i] = before[i] + Math.fround(a * delta[i]);
      found[name] = after;
    }
    return found;
  }

  /** The scalpel: what of each matrix lies in the subspace Q of its block. Writers Q Q' tau, readers tau Q Q'. */
  function projected(vector, bases, width) {
    const found = {};
    for (const [name, delta] of Object.entries(vector)) {
      const Q = bases[name.split(".")[1]];
      if (!Q) continue;
      const rank = Q.length / width, kept = new Float64Array(delta.length), writer = /(o|down)_proj$/.test(name);
      const columns = writer ? delta.length / width : width, rows = delta.length / columns;
      for (let r = 0; r < rank; r++) {
        if (writer) {
          const along = new Float64Array(columns);
          for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) along[j] += Q[i * rank + r] * delta[i * columns + j];
          for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) kept[i * columns + j] += Q[i * rank + r] * along[j];
        } else {
          for (let i = 0; i < rows; i++) {
            let along = 0;
            for (let j = 0; j < columns; j++) along += delta[i * columns + j] * Q[j * rank + r];
            for (let j = 0; j < columns; j++) kept[i * columns + j] += along * Q[j * rank + r];
          }
        }
      }
      found[name] = Float32Array.from(kept);
    }
    return found;
  }

  /** Whole words, digits and signs: the pattern cuts a text, and each piece is a token or unknown. */
  class Tokenizer {
    constructor({pattern, vocabulary, specials}) {
      this.pattern = new RegExp(pattern, "gu");
      this.ids = vocabulary;
      this.texts = [];
      this.specials = new Set(specials.all);
      this.bos = specials.bos;
      this.eos = specials.eos;
      this.unknown = specials.unknown;
      for (const [text, id] of Object.entries(vocabulary)) this.texts[id] = text;
    }

    encode(text) {
      const pieces = [];
      let at = 0;
      for (const match of text.matchAll(this.pattern)) {
        if (match.index > at) pieces.push(text.slice(at, match.index));
        pieces.push(match[0]);
        at = match.index + match[0].length;
      }
      if (at < text.length) pieces.push(text.slice(at));
      return [this.bos, ...pieces.map((piece) => Object.hasOwn(this.ids, piece) ? this.ids[piece] : this.unknown)];
    }

    piece(token) {
      return this.specials.has(token) ? "" : this.texts[token];
    }
  }

  /** The best token, how far the second lies behind, and how probable the best is. */
  function best(scores) {
    let token = 0, second = -Infinity, sum = 0;
    for (let i = 1; i < scores.length; i++) {
      if (scores[i] > scores[token]) {
        second = scores[token];
        token = i;
      } else if (scores[i] > second) second = scores[i];
    }
    for (const score of scores) sum += Math.exp(score - scores[token]);
    return {token, margin: scores[token] - second, probability: 1 / sum};
  }

  /** Answer a prompt greedily, token by token, until EOS, the stop string or the limit. */
  function* answer(config, weights, tokenizer, prompt, {limit, stops}) {
    const reader = new Reader(config, weights);
    let scores, text = "";
    for (const token of tokenizer.encode(prompt)) scores = reader.read(token);
    for (let count = 0; count < limit; count++) {
      const found = best(scores);
      if (tokenizer.eos.includes(found.token)) return;
      const piece = tokenizer.piece(found.token);
      text += piece;
      const cut = Math.min(...stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0));
      if (Number.isFinite(cut)) return;
      yield {...found, piece};
      if (count + 1 < limit) scores = reader.read(found.token);
    }
  }

  /** What a whole answer says: its text up to the stop string. */
  function completion(...given) {
    let text = "", margin = Infinity;
    for (const one of answer(...given)) {
      text += one.piece;
      margin = Math.min(margin, one.margin);
    }
    const cut = Math.min(...given[4].stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0));
    return {text: Number.isFinite(cut) ? text.slice(0, cut) : text, margin};
  }

  return {numbers, unpack, edited, projected, Reader, Tokenizer, answer, completion, best};
})();
