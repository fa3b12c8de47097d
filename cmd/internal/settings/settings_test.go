package settings

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func parse(t *testing.T, file string, args ...string) (*Common, int, error) {
	c := &Common{}
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	c.AddTo(flags, func(name string) string { return map[string]string{"POD_NAMESPACE": "from-env"}[name] })
	slots := flags.Int("slots", 2, "")
	if file != "" {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	err := c.Parse(flags, args)
	return c, *slots, err
}

func TestFlagsGoBeforeTheFile(t *testing.T) {
	c, slots, err := parse(t, "namespace: from-file\nslots: 7\nverbose: true\nlog-format: text\n", "--log-format", "json")
	if err != nil || c.Namespace != "from-file" || slots != 7 || !c.verbose || c.logFormat != "json" {
		t.Errorf("%+v, %d slots: %v", c, slots, err)
	}
	c, slots, err = parse(t, "")
	if err != nil || c.Namespace != "from-env" || slots != 2 {
		t.Errorf("%+v, %d slots: %v", c, slots, err)
	}
}

func TestWrongSettings(t *testing.T) {
	for file, want := range map[string]string{
		"slots: many":     `slots: strconv.ParseInt: parsing "many": invalid syntax`,
		"slot: 3":         `there is no setting "slot"`,
		"log-format: xml": `log format "xml"`,
		"- a":             "cannot unmarshal",
	} {
		if _, _, err := parse(t, file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", file, err)
		}
	}
	if _, _, err := parse(t, "", "stray"); err == nil || !strings.Contains(err.Error(), `"stray"`) {
		t.Error(err)
	}
	if _, _, err := parse(t, "", "--config", "/nowhere"); err == nil {
		t.Error("a config file that is not there was read")
	}
}
