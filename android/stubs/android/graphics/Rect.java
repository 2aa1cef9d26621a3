package android.graphics;

public final class Rect {
    public Rect(int left, int top, int right, int bottom) {}

    public void offset(int dx, int dy) {}

    public int centerX() {
        return 0;
    }

    public int centerY() {
        return 0;
    }
}
