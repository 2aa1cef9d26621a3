package ai.onnxruntime;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;

public class OnnxTensor {
    final ByteBuffer data;
    final long[] shape;
    boolean closed = false;

    OnnxTensor(ByteBuffer data, long[] shape) {
        this.data = data;
        this.shape = shape;
    }

    public static OnnxTensor createTensor(
            OrtEnvironment environment, ByteBuffer data, long[] shape, OnnxJavaType type) {
        long count = 1;
        for (long size : shape) {
            count *= size;
        }
        int width = type == OnnxJavaType.INT64 ? 8 : type == OnnxJavaType.FLOAT ? 4 : 2;
        if (!data.isDirect() || data.remaining() != count * width) {
            throw new IllegalArgumentException(data.remaining() + " bytes for " + count + " values");
        }
        return new OnnxTensor(data.order(ByteOrder.nativeOrder()), shape);
    }

    public ByteBuffer getByteBuffer() {
        check();
        return data.duplicate().order(ByteOrder.nativeOrder());
    }

    public void close() {
        closed = true;
    }

    void check() {
        if (closed) {
            throw new IllegalStateException("a closed tensor is used");
        }
    }
}
