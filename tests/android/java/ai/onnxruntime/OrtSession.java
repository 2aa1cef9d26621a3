package ai.onnxruntime;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.HashMap;
import java.util.Map;
import java.util.Optional;

/**
 * In place of a model: the cache holds the tokens, and the logit of v after tokens t is
 * (sum of (i + 1) * t[i] + 7 * v) mod 97.
 */
public class OrtSession {
    static final int LAYERS = 2, VOCABULARY = 50;

    public static class SessionOptions {
        public void setIntraOpNumThreads(int count) {}
    }

    public static class Result {
        private final Map<String, OnnxTensor> values = new HashMap<>();

        public Optional<OnnxTensor> get(String name) {
            return Optional.ofNullable(values.get(name));
        }

        public void close() {
            values.values().forEach(OnnxTensor::close);
        }
    }

    OrtSession(String path) {
        if (!new java.io.File(path).exists()) {
            throw new IllegalArgumentException("no file " + path);
        }
    }

    public Result run(Map<String, OnnxTensor> inputs) {
        inputs.values().forEach(OnnxTensor::check);
        OnnxTensor ids = inputs.get("input_ids");
        int count = (int) ids.shape[1];
        int past = (int) inputs.get("past_key_values.0.key").shape[2];
        if (inputs.size() != 2 + 2 * LAYERS
                || inputs.get("attention_mask").shape[1] != past + count) {
            throw new IllegalArgumentException("wrong inputs");
        }
        float[] tokens = new float[past + count];
        ByteBuffer cached = inputs.get("past_key_values.1.value").getByteBuffer();
        for (int i = 0; i < past; i++) {
            tokens[i] = cached.getFloat();
        }
        ByteBuffer fresh = ids.getByteBuffer();
        for (int i = past; i < past + count; i++) {
            tokens[i] = fresh.getLong();
        }
        ByteBuffer logits = buffer(count * VOCABULARY * 4);
        float sum = 0;
        for (int i = 0; i < past + count; i++) {
            sum += (i + 1) * tokens[i];
            for (int v = 0; i >= past && v < VOCABULARY; v++) {
                logits.putFloat((sum + 7 * v) % 97);
            }
        }
        logits.rewind();
        Result result = new Result();
        result.values.put("logits", new OnnxTensor(logits, new long[] {1, count, VOCABULARY}));
        for (int layer = 0; layer < LAYERS; layer++) {
            for (String kind : new String[] {"key", "value"}) {
                ByteBuffer cache = buffer(tokens.length * 4);
                for (float token : tokens) {
                    cache.putFloat(token);
                }
                cache.rewind();
                result.values.put(
                        "present." + layer + "." + kind,
                        new OnnxTensor(cache, new long[] {1, 1, tokens.length, 1}));
            }
        }
        return result;
    }

    public void close() {}

    private static ByteBuffer buffer(int size) {
        return ByteBuffer.allocateDirect(size).order(ByteOrder.nativeOrder());
    }
}
