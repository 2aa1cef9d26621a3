package ai.onnxruntime;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.util.HashMap;
import java.util.Map;
import java.util.Optional;
import java.util.Set;

/**
 * In place of a model whose inputs and outputs a text file lists, one a line: "in" or "out", name,
 * type, shape. The cache holds the tokens, and the last token's logit of v after tokens t is
 * (sum of (i + 1) * t[i] + 7 * v) mod 97.
 */
public class OrtSession {
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

    private final Map<String, NodeInfo> inputs = new HashMap<>();
    private final Map<String, NodeInfo> outputs = new HashMap<>();

    OrtSession(String path) {
        try {
            for (String line : Files.readAllLines(Paths.get(path))) {
                String[] words = line.split(" ");
                long[] shape = new long[words.length - 3];
                for (int i = 0; i < shape.length; i++) {
                    shape[i] = Long.parseLong(words[i + 3]);
                }
                TensorInfo info = new TensorInfo(OnnxJavaType.valueOf(words[2]), shape);
                (words[0].equals("in") ? inputs : outputs).put(words[1], new NodeInfo(info));
            }
        } catch (IOException error) {
            throw new IllegalArgumentException("no file " + path);
        }
    }

    public Map<String, NodeInfo> getInputInfo() {
        return inputs;
    }

    public Map<String, NodeInfo> getOutputInfo() {
        return outputs;
    }

    public Result run(Map<String, OnnxTensor> given) {
        if (!given.keySet().equals(inputs.keySet())) {
            throw new IllegalArgumentException(
                    "inputs " + given.keySet() + ", expected " + inputs.keySet());
        }
        for (Map.Entry<String, OnnxTensor> one : given.entrySet()) {
            one.getValue().check();
            long[] wanted = shape(inputs, one.getKey());
            long[] shape = one.getValue().shape;
            for (int i = 0; i < wanted.length; i++) {
                if (shape.length != wanted.length || (wanted[i] >= 0 && shape[i] != wanted[i])) {
                    throw new IllegalArgumentException("the shape of " + one.getKey());
                }
            }
        }
        OnnxTensor ids = given.get("input_ids");
        int count = (int) ids.shape[1];
        OnnxTensor cached = given.get("past_key_values.0.key");
        int past = (int) cached.shape[2];
        if (given.get("attention_mask").shape[1] != past + count) {
            throw new IllegalArgumentException("the length of attention_mask");
        }
        float[] tokens = new float[past + count];
        ByteBuffer old = cached.getByteBuffer();
        for (int i = 0; i < past; i++) {
            tokens[i] = old.getFloat(4 * i * (int) cached.shape[3]);
        }
        ByteBuffer fresh = ids.getByteBuffer();
        for (int i = past; i < past + count; i++) {
            tokens[i] = fresh.getLong();
        }
        float sum = 0;
        for (int i = 0; i < past + count; i++) {
            sum += (i + 1) * tokens[i];
        }
        Result result = new Result();
        for (String name : outputs.keySet()) {
            long[] shape = shape(outputs, name).clone();
            shape[0] = 1;
            if (!name.equals("logits")) {
                shape[2] = past + count;
            }
            int size = 1;
            for (long one : shape) {
                size *= (int) one;
            }
            ByteBuffer data = ByteBuffer.allocateDirect(4 * size).order(ByteOrder.nativeOrder());
            for (int i = 0; i < size; i++) {
                int width = (int) shape[shape.length - 1];
                data.putFloat(
                        name.equals("logits")
                                ? (sum + 7 * i) % 97
                                : tokens[i / width % (past + count)]);
            }
            data.rewind();
            result.values.put(name, new OnnxTensor(data, shape));
        }
        return result;
    }

    public void close() {}

    private static long[] shape(Map<String, NodeInfo> infos, String name) {
        return ((TensorInfo) infos.get(name).getInfo()).getShape();
    }
}
