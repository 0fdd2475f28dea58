// Filters of the sample: an item is shown when it passes all three. Without JavaScript everything is shown.
(function () {
  "use strict";
  var fields = ["task", "kind", "differs"].map(function (name) { return document.getElementById("filter-" + name); });
  var cards = Array.prototype.slice.call(document.querySelectorAll("[data-card]"));
  var count = document.getElementById("filter-count");
  function apply() {
    var shown = 0;
    cards.forEach(function (card) {
      var keep = fields.every(function (field) {
        return field.value === "" || card.getAttribute("data-" + field.name) === field.value;
      });
      card.hidden = !keep;
      shown += keep ? 1 : 0;
    });
    count.textContent = shown + " of " + cards.length + " shown";
  }
  fields.forEach(function (field) { field.addEventListener("change", apply); });
  document.getElementById("filters").hidden = false;
  apply();
})();
