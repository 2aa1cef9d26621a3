package org.pocketslm;

import android.graphics.Rect;
import android.os.Bundle;
import android.view.View;
import android.view.accessibility.AccessibilityEvent;
import android.view.accessibility.AccessibilityNodeInfo;
import android.view.accessibility.AccessibilityNodeProvider;

/**
 * Tells Android's screen readers what Kivy has drawn: one virtual view for each thing on the screen.
 *
 * <p>Kivy draws on a single surface, so Android sees no buttons in it. Python hands over labels,
 * roles and places ({@code pocketslm.android.phone.accessibility}); a double tap in a screen reader
 * goes back to Python as a tap in the middle of the thing.
 */
public final class ScreenReader extends View.AccessibilityDelegate {
    /** Python's side: touch the screen at this point, in pixels from its top left. */
    public interface Taps {
        void tap(int x, int y);
    }

    private final View surface;
    private final Taps taps;
    private String[] labels = {};
    private String[] roles = {};
    private int[] places = {};
    private final Provider provider = new Provider();

    public ScreenReader(View surface, Taps taps) {
        this.surface = surface;
        this.taps = taps;
    }

    /** Replaces what is on the screen; places: left, top, right, bottom of each thing. */
    public void update(String[] labels, String[] roles, int[] places) {
        synchronized (this) {
            this.labels = labels;
            this.roles = roles;
            this.places = places;
        }
        surface.post(
                () -> surface.sendAccessibilityEvent(AccessibilityEvent.TYPE_WINDOW_CONTENT_CHANGED));
    }

    /** Makes this the delegate of the surface; on the UI thread. */
    public void attach() {
        surface.setImportantForAccessibility(View.IMPORTANT_FOR_ACCESSIBILITY_YES);
        surface.setAccessibilityDelegate(this);
    }

    @Override
    public AccessibilityNodeProvider getAccessibilityNodeProvider(View host) {
        return provider;
    }

    private final class Provider extends AccessibilityNodeProvider {
        @Override
        public AccessibilityNodeInfo createAccessibilityNodeInfo(int id) {
            synchronized (ScreenReader.this) {
                if (id == View.NO_ID) {
                    AccessibilityNodeInfo host = AccessibilityNodeInfo.obtain(surface);
                    surface.onInitializeAccessibilityNodeInfo(host);
                    for (int child = 0; child < labels.length; child++) {
                        host.addChild(surface, child);
                    }
                    return host;
                }
                if (id < 0 || id >= labels.length) {
                    return null;
                }
                return describe(id);
            }
        }

        private AccessibilityNodeInfo describe(int id) {
            AccessibilityNodeInfo info = AccessibilityNodeInfo.obtain(surface, id);
            info.setParent(surface);
            info.setPackageName(surface.getContext().getPackageName());
            info.setClassName(className(roles[id]));
            info.setContentDescription(labels[id]);
            Rect place = place(id);
            int[] corner = new int[2];
            surface.getLocationOnScreen(corner);
            place.offset(corner[0], corner[1]);
            info.setBoundsInScreen(place);
            info.setVisibleToUser(true);
            info.setEnabled(true);
            if (!"text".equals(roles[id])) {
                info.setClickable(true);
                info.addAction(AccessibilityNodeInfo.ACTION_CLICK);
            }
            return info;
        }

        @Override
        public boolean performAction(int id, int action, Bundle arguments) {
            Rect place;
            synchronized (ScreenReader.this) {
                boolean known = id >= 0 && id < labels.length;
                if (action != AccessibilityNodeInfo.ACTION_CLICK || !known) {
                    return false;
                }
                place = place(id);
            }
            taps.tap(place.centerX(), place.centerY());
            return true;
        }

        private Rect place(int id) {
            int at = 4 * id;
            return new Rect(places[at], places[at + 1], places[at + 2], places[at + 3]);
        }

        private String className(String role) {
            switch (role) {
                case "field":
                    return "android.widget.EditText";
                case "radio":
                    return "android.widget.RadioButton";
                case "text":
                    return "android.widget.TextView";
                default:
                    return "android.widget.Button";
            }
        }
    }
}
