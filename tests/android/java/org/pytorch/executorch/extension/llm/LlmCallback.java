package org.pytorch.executorch.extension.llm;

public interface LlmCallback {
    void onResult(String result);

    void onStats(String stats);
}
