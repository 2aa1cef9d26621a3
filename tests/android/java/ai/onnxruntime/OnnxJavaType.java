package ai.onnxruntime;

public enum OnnxJavaType {
    FLOAT,
    FLOAT16,
    INT64
}
